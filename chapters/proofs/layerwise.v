(** Layer by layer is global. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius graph projector.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-layerwise: that the slope of T is the inner product with its gradient is how
    the slope is defined here; for polynomials it is proved in hessian.v. *)

Section Layerwise.
Variables (F : realFieldType) (L : finType) (d_out d_in n : L -> nat).
Variables (R : forall l, 'M[F]_(d_in l, n l)) (P : forall l, 'M[F]_(d_in l)).
Hypothesis projector_of : forall l, null_projector (P l) (R l).
Implicit Types G C : @weights F L d_out d_in.

(** The projection of all layers: G_l P_l for each layer l. *)
Definition project G : @weights F L d_out d_in := fun l => G l *m P l.

(** The changes that no layer notices on the batch. *)
Definition in_null_space G : Prop := forall l, G l *m R l = 0.

(** The projection is idempotent.

    verifies: thm-layerwise *)
Theorem project_idempotent G l : project (project G) l = project G l.
Proof. by rewrite /project -mulmxA; case: (projector_of l) => _ ->. Qed.

(** It is self-adjoint: it may change sides in the inner product over all layers.

    verifies: thm-layerwise *)
Theorem project_self_adjoint G C : pairing (project G) C = pairing G (project C).
Proof.
apply: eq_bigr => l _; rewrite innerC inner_mulr innerC.
by case: (projector_of l) => ->.
Qed.

(** Its fixed points are exactly the changes in the null space, and all it returns lies there.

    verifies: thm-layerwise *)
Theorem project_fixed G : (forall l, project G l = G l) <-> in_null_space G.
Proof. by split=> fixed l; apply/(fixed_iff_admissible _ (projector_of l)); exact: fixed. Qed.

Lemma project_in G : in_null_space (project G).
Proof. by apply/project_fixed => l; exact: project_idempotent. Qed.

Lemma pairingC G C : pairing G C = pairing C G.
Proof. by apply: eq_bigr => l _; exact: innerC. Qed.

Lemma eq_pairing G C C' : (forall l, C l = C' l) -> pairing G C = pairing G C'.
Proof. by move=> same; apply: eq_bigr => l _; rewrite same. Qed.

(** The slope of T along the projected gradient A = pi(grad T) is its squared length.

    verifies: thm-layerwise *)
Theorem slope_is_length A : pairing A (project A) = pairing (project A) (project A).
Proof.
by rewrite project_self_adjoint; apply: eq_pairing => l; rewrite project_idempotent.
Qed.

Lemma pairing_ge0 G : 0 <= pairing G G.
Proof. by apply: sumr_ge0 => l _; exact: norm2_ge0. Qed.

(** It is never negative, and 0 only if nothing is left of the gradient.

    verifies: thm-layerwise *)
Theorem slope_positive A :
  0 <= pairing A (project A) /\ (pairing A (project A) = 0 <-> forall l, project A l = 0).
Proof.
rewrite slope_is_length; split; first exact: pairing_ge0.
split=> [/eqP|zero]; last by rewrite /pairing big1 // => l _; rewrite zero inner0l.
rewrite psumr_eq0 => [/allP zero l|l _]; last exact: norm2_ge0.
by apply/eqP; rewrite -norm2_eq0; exact: zero (mem_index_enum l).
Qed.

(** The inequality of Cauchy and Schwarz for all layers together. *)
Lemma pairing_cauchy_schwarz G C : pairing G C ^+ 2 <= pairing G G * pairing C C.
Proof.
have [zero|nonzero] := eqVneq (pairing C C) 0.
  have zeros l : C l = 0.
    move/eqP: zero; rewrite psumr_eq0 => [/allP zero|k _]; last exact: norm2_ge0.
    by apply/eqP; rewrite -norm2_eq0; exact: zero (mem_index_enum l).
  rewrite zero mulr0 (_ : pairing G C = 0) ?expr0n //.
  by apply: big1 => l _; rewrite zeros inner0r.
have positive : 0 < pairing C C by rewrite lt_def nonzero pairing_ge0.
pose t := pairing G C / pairing C C.
have := pairing_ge0 (fun l => G l - t *: C l).
have -> : pairing (fun l => G l - t *: C l) (fun l => G l - t *: C l)
    = pairing G G - t * pairing G C *+ 2 + t ^+ 2 * pairing C C.
  rewrite /pairing mulr_sumr -sumrMnl mulr_sumr -sumrB -big_split /=; apply: eq_bigr => l _.
  rewrite -scaleNr -[inner _ _]/(norm2 _) norm2D norm2Z innerZr sqrrN mulNr mulrN.
  by rewrite mulr_natl.
have -> : t ^+ 2 * pairing C C = t * pairing G C.
  by rewrite expr2 -mulrA /t divfK.
rewrite mulr2n opprD addrA subrK subr_ge0 => le.
have -> : pairing G C ^+ 2 = t * pairing G C * pairing C C.
  by rewrite mulrAC /t divfK // expr2.
by rewrite ler_pmul2r.
Qed.

(** The slope of T along any change C in the null space is at most the length of pi(A) times that
    of C (here squared): so of all changes of one length, that along pi(A) raises T most.

    verifies: thm-layerwise *)
Theorem steepest A C : in_null_space C ->
  pairing A C ^+ 2 <= pairing (project A) (project A) * pairing C C.
Proof.
move/project_fixed => fixed.
have -> : pairing A C = pairing (project A) C.
  by rewrite project_self_adjoint; apply: eq_pairing => l; rewrite fixed.
exact: pairing_cauchy_schwarz.
Qed.

End Layerwise.
