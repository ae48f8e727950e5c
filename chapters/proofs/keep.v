(** Keeping a function while learning. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius graph invariance.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-keep: that a given optimizer makes steps of the form asked for in part 2;
    part 4 says what is left of both terms, not when it is not 0. *)

Section Keep.
Variables (R : comRingType) (N n : nat) (L : finType) (d_out d_in : L -> nat).
Variables (W0 : @weights R L d_out d_in) (P : forall l, 'M[R]_(d_in l)).
Variables (v : memory R N n) (g : @graph R N n L d_out d_in).
Implicit Types W C : @weights R L d_out d_in.

(** On the old data v, at the weights W0, each P l kills the inputs of every call of layer l. *)
Hypothesis kills : every_input (fun l X => P l *m X = 0) W0 v g.

(** The displacement from W0 is in the null space of the old data: W = W0 + C P. *)
Definition displaced W : Prop := exists C, forall l, W l = W0 l + C l *m P l.

(** Then all that the computation makes of the old data is as it was, however large C is, and
    whatever has happened on the way.

    verifies: thm-keep *)
Theorem displacements_keep W : displaced W -> trace W v g = trace W0 v g.
Proof.
case=> C WC; pose dW : @weights R L d_out d_in := fun l => C l *m P l.
have adm : admissible dW W0 v g.
  by apply: every_input_impl kills => l X PX; rewrite /dW -mulmxA PX mulmx0.
rewrite -(invariance 1 adm); elim: g v => //= s h IH v'; rewrite -IH.
suff -> : after W v' s = after (moved W0 1 dW) v' s by [].
by case: s => //= l A B; rewrite WC /moved /dW scale1r.
Qed.

(** The replacement W <- W0 + (W - W0) P. *)
Definition replaced (base W : @weights R L d_out d_in) : @weights R L d_out d_in :=
  fun l => base l + (W l - base l) *m P l.

(** After a replacement the displacement is in the null space, whatever has made W.

    verifies: thm-keep *)
Theorem replaced_displaced W : displaced (replaced W0 W).
Proof. by exists (fun l => W l - W0 l). Qed.

(** It is the same whether displacements are counted from W0 or from the weights V after the last
    replacement.

    verifies: thm-keep *)
Theorem replaced_from_last V W : (forall l, P l *m P l = P l) -> displaced V ->
  forall l, replaced V W l = replaced W0 W l.
Proof.
move=> idem [C VC] l; rewrite /replaced VC !mulmxBl mulmxDl -[C l *m P l *m P l]mulmxA idem.
by rewrite opprD [W l *m P l + _]addrA addrACA subrr addr0.
Qed.

(** Steps made of projected gradients: after each, W moves by some D P, where D is the same
    combination of the gradients that the step makes of the projected ones.

    verifies: thm-keep *)
Theorem gradients_keep (steps : seq (@weights R L d_out d_in)) W :
  (forall l, W l = W0 l + \sum_(D <- steps) D l *m P l) -> displaced W.
Proof.
move=> sum; exists (fun l => \sum_(D <- steps) D l) => l.
by rewrite sum mulmx_suml.
Qed.

(** A linear combination of projected gradients is the projection of the combination.

    verifies: thm-keep *)
Theorem combination_projected l (I : finType) (c : I -> R) (G : I -> 'M[R]_(d_out l, d_in l)) :
  \sum_i c i *: (G i *m P l) = (\sum_i c i *: G i) *m P l.
Proof. by rewrite mulmx_suml; apply: eq_bigr => i _; rewrite scalemxAl. Qed.

(** For plain gradient descent from W, projecting the gradient G and replacing after the step give
    the same weights.

    verifies: thm-keep *)
Theorem both_the_same W (G : @weights R L d_out d_in) a :
  (forall l, P l *m P l = P l) -> displaced W ->
  forall l, replaced W0 (fun k => W k - a *: G k) l = W l - a *: (G l *m P l).
Proof.
move=> idem [C WC] l; rewrite /replaced WC.
have -> : W0 l + C l *m P l - a *: G l - W0 l = C l *m P l - a *: G l.
  by rewrite addrAC [W0 l + _]addrC addrK.
by rewrite mulmxBl -mulmxA idem -scalemxAl addrA.
Qed.

End Keep.
