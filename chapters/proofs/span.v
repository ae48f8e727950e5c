(** The span of the primary gradient. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius graph.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

(** not covered: thm-span: that the derivatives which PyTorch gives for the other operations are
    right, and rounding. *)

Section Span.
Variables (R : comRingType) (N n : nat) (L : finType) (d_out d_in : L -> nat).
Implicit Types (W dW : @weights R L d_out d_in) (v e : memory R N n).
Implicit Type g : @graph R N n L d_out d_in.

(** The backward pass gives the gradient. If e is the gradient of the loss by the memory at the
    end, then the change of the loss to first order, along any change dW of the weights, is the
    inner product of what the backward pass returns with dW.

    verifies: thm-span *)
Theorem backward_is_gradient W dW v dv g e : transposed g ->
  inner e (tangent W dW v dv g) = pairing (gradient W v g e) dW + inner (error W v g e) dv.
Proof.
elim: g v dv => /= [|s g IH] v dv.
  by rewrite /pairing /gradient /error big1 ?add0r // => l _; rewrite inner0l.
case=> here /IH ->; rewrite /gradient /error /=; case: s here => [l A B _|f D E here] /=.
  case: (backward _ _ g e) => e' G /=; rewrite pairing_add_at -addrA [RHS]addrCA; congr (_ + _).
  rewrite innerDr innerDl addrCA; congr (_ + _).
  rewrite inner_mull innerDr; congr (_ + _); first by rewrite inner_mulr.
  by rewrite inner_mull inner_mull.
by case: (backward _ _ g e) => e' G /=; rewrite here.
Qed.

(** For one call with the errors D = [delta_1, ..., delta_n] and the inputs R = [x_1, ..., x_n] as
    columns: D R^T is the sum of the delta_i x_i^T.

    verifies: thm-span *)
Theorem sum_of_outer_products d k m (D : 'M[R]_(d, m)) (X : 'M[R]_(k, m)) :
  D *m X^T = \sum_i col i D *m (col i X)^T.
Proof.
apply/matrixP => a c; rewrite !mxE summxE; apply: eq_bigr => i _.
by rewrite !mxE big_ord1 !mxE.
Qed.

(** What kills all inputs of a layer from the right kills its gradient: if X^T P = 0 for the
    inputs X of every call of layer l, then the gradient of l times P is 0.

    verifies: thm-span *)
Theorem gradient_is_killed k (P : forall l, 'M[R]_(d_in l, k)) W v g e :
  every_input (fun l X => X^T *m P l = 0) W v g -> forall l, gradient W v g e l *m P l = 0.
Proof.
rewrite /gradient; elim: g v => /= [|s g IH] v; first by move=> _ l; rewrite mul0mx.
case: s => [l A B|f D E] [here later] k'; have := IH _ later k'; rewrite /after.
  case: (backward _ _ g e) => e' G /= zero; have [lk|lk] := eqVneq l k'.
    by move: here zero; rewrite -lk => here; rewrite add_at_eq mulmxDl -mulmxA here mulmx0 add0r.
  by rewrite add_at_neq.
by case: (backward _ _ g e).
Qed.

End Span.

Section RowSpace.
Variables (F : fieldType) (N n : nat) (L : finType) (d_out d_in : L -> nat).
Implicit Types (W : @weights F L d_out d_in) (v e : memory F N n).

(** Each row of the gradient of a layer is a linear combination of the inputs of its calls. In
    words of subspaces: a space U l that contains the inputs of all calls of l, as rows, contains
    the rows of the gradient.

    verifies: thm-span *)
Theorem rows_in_span k (U : forall l, 'M[F]_(k l, d_in l)) W v g e :
  every_input (fun l X => (X^T <= U l)%MS) W v g -> forall l, (gradient W v g e l <= U l)%MS.
Proof.
rewrite /gradient; elim: g v => /= [|s g IH] v; first by move=> _ l; exact: sub0mx.
case: s => [l A B|f D E] [here later] k'; have := IH _ later k'; rewrite /after.
  case: (backward _ _ g e) => e' G /= inside; have [lk|lk] := eqVneq l k'.
    move: here inside; rewrite -lk => here inside.
    by rewrite add_at_eq addmx_sub // (submx_trans (submxMl _ _)).
  by rewrite add_at_neq.
by case: (backward _ _ g e).
Qed.

End RowSpace.
