(** Exercises: replace each [Admitted.] by a proof and [Qed.]. To check:
    teleport book proofs --exercise FILE *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** One star. The projector P = I - B B^T is idempotent if the columns of B are orthonormal.
    What you need: mulmxBl, mulmxBr, mul1mx, mulmx1, mulmxA, subrr, subr0. *)
Theorem idempotent (F : fieldType) d k (B : 'M[F]_(d, k)) :
  B^T *m B = 1%:M -> (1%:M - B *m B^T) *m (1%:M - B *m B^T) = 1%:M - B *m B^T.
Proof.
Admitted.

(** Two stars. Break the invariance: a change that maps the input X of a layer to 0 may change what
    the layer makes of another input Y. Find one over the rational numbers.
    What you need: exists with numbers, or 'delta_mx'; mul_delta_mx, mul_delta_mx_0. *)
Theorem broken : exists (dW : 'M[rat]_(1, 2)) (X Y : 'M[rat]_(2, 1)),
  dW *m X = 0 /\ dW *m Y != 0.
Proof.
Admitted.
