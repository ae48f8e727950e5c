(** The rivals: the group action, its first-order inverse, the linearised step, change of basis. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-group-action: that the pseudo-inverse of independent columns is a left inverse;
    here any left inverse will do. *)
(** not covered: thm-linearised: the bound of the drift by Taylor's formula, which needs real
    analysis. *)
Section Action.
Variables (F : fieldType) (m d n k : nat) (sigma inverse : F -> F).

(** The inputs of the next layer: the activation of the outputs Z, and a row of ones. *)
Definition next_inputs (Z : 'M[F]_(m, n)) : 'M[F]_(m + 1, n) :=
  col_mx (map_mx sigma Z) (const_mx 1).

(** E with a 1 added for the bias. *)
Definition with_bias (E : 'M[F]_m) : 'M[F]_(m + 1) := block_mx E 0 0 1%:M.

(** The new weights of the layer: W + (sigma^-1(E S) - Z) R^+, with Z = W R and S = sigma(Z). *)
Definition acted (W : 'M[F]_(m, d)) (R : 'M_(d, n)) (Rplus : 'M_(n, d)) (E : 'M_m) :=
  W + (map_mx inverse (E *m map_mx sigma (W *m R)) - W *m R) *m Rplus.

(** The activations become E S, and the outputs of the next layer, whose weights become V Ebar^-1,
    are as they were.

    verifies: thm-group-action *)
Theorem group_action (W : 'M[F]_(m, d)) (R : 'M_(d, n)) Rplus (E : 'M_m) (V : 'M_(k, m + 1)) :
  Rplus *m R = 1%:M -> with_bias E \in unitmx ->
  (forall i j, let y := (E *m map_mx sigma (W *m R)) i j in sigma (inverse y) = y) ->
  let Z' := acted W R Rplus E *m R in
  map_mx sigma Z' = E *m map_mx sigma (W *m R) /\
  V *m invmx (with_bias E) *m next_inputs Z' = V *m next_inputs (W *m R).
Proof.
move=> left unit range Z'.
have Z'E : Z' = map_mx inverse (E *m map_mx sigma (W *m R)).
  by rewrite /Z' /acted mulmxDl -mulmxA left mulmx1 addrC subrK.
have S'E : map_mx sigma Z' = E *m map_mx sigma (W *m R).
  by rewrite Z'E; apply/matrixP => i j; rewrite [LHS]mxE [map_mx inverse _ _ _]mxE range.
split=> //; rewrite /next_inputs S'E -mulmxA; congr (_ *m _).
have -> : col_mx (E *m map_mx sigma (W *m R)) (const_mx 1) = with_bias E *m next_inputs (W *m R).
  by rewrite /with_bias /next_inputs mul_block_col !mul0mx mul1mx addr0 add0r.
by rewrite mulmxA mulVmx // mul1mx.
Qed.

(** The identity changes nothing.

    verifies: thm-group-action *)
Theorem identity_action (W : 'M[F]_(m, d)) (R : 'M_(d, n)) Rplus (V : 'M_(k, m + 1)) :
  (forall z, inverse (sigma z) = z) ->
  acted W R Rplus 1%:M = W /\ V *m invmx (with_bias 1%:M) = V.
Proof.
move=> inv; split; last by rewrite /with_bias -scalar_mx_block invmx1 mulmx1.
rewrite /acted mul1mx; set Z := W *m R.
have -> : map_mx inverse (map_mx sigma Z) = Z by apply/matrixP => i j; rewrite !mxE inv.
by rewrite subrr mul0mx addr0.
Qed.

(** With I - Mbar in place of the inverse, Mbar = Ebar - I, the outputs of the next layer change by
    - V Mbar^2 R.

    verifies: thm-first-order-inverse *)
Theorem first_order_inverse p q (V : 'M[F]_(k, p)) (Ebar : 'M_p) (X : 'M_(p, q)) :
  let Mbar := Ebar - 1%:M in
  V *m (1%:M - Mbar) *m (Ebar *m X) - V *m X = - (V *m (Mbar *m Mbar) *m X).
Proof.
move=> Mbar; have -> : Ebar = 1%:M + Mbar by rewrite /Mbar addrC subrK.
rewrite -!mulmxA -mulmxBr -mulmxN; congr (_ *m _).
by rewrite mulmxA mulmxBl mul1mx mulmxDr mulmx1 opprD addrA addrK mulmxBl mul1mx mulmxA addrAC subrr sub0r.
Qed.

(** Change of basis: if sigma(c z) = c sigma(z) for the factors c of the diagonal matrix C, then the
    network with C W and V Cbar^-1 computes the same on all inputs R.

    verifies: thm-change-of-basis *)
Theorem change_of_basis (W : 'M[F]_(m, d)) (R : 'M_(d, n)) (c : 'rV[F]_m) (V : 'M_(k, m + 1)) :
  with_bias (diag_mx c) \in unitmx -> (forall i z, sigma (c 0 i * z) = c 0 i * sigma z) ->
  V *m invmx (with_bias (diag_mx c)) *m next_inputs (diag_mx c *m W *m R)
    = V *m next_inputs (W *m R).
Proof.
move=> unit hom; rewrite -mulmxA; congr (_ *m _).
have -> : next_inputs (diag_mx c *m W *m R) = with_bias (diag_mx c) *m next_inputs (W *m R).
  rewrite /with_bias /next_inputs mul_block_col !mul0mx mul1mx addr0 add0r; congr col_mx.
  by rewrite -mulmxA !mul_diag_mx; apply/matrixP => i j; rewrite !mxE hom.
by rewrite mulmxA mulVmx // mul1mx.
Qed.

End Action.

Section Linearised.
Variables (F : realFieldType) (d : nat).
Implicit Types g a x : 'cV[F]_d.

(** What the linearised step maximises, with a = H g: the increase of T less a penalty of the
    length; among the steps x that lead back to the level to first order, <g, x> = - level. *)
Definition gain (eta : F) a x : F := inner a x - (2%:R * eta)^-1 * norm2 x.

(** The step of the book.  *)
Definition linear_step eta (level : F) g a : 'cV[F]_d :=
  eta *: (a - (inner g a / norm2 g) *: g) - (level / norm2 g) *: g.

(** It satisfies the constraint.

    verifies: thm-linearised *)
Theorem linear_step_level eta level g a : norm2 g != 0 -> inner g (linear_step eta level g a) = - level.
Proof.
move=> g0; rewrite /linear_step innerBr !innerZr innerBr innerZr -/(norm2 g).
by rewrite !divfK // subrr mulr0 sub0r.
Qed.

(** And it is the only maximum: any other step y that satisfies it gains less, by the squared
    distance over 2 eta.

    verifies: thm-linearised *)
Theorem linear_step_best eta level g a y : 0 < eta -> norm2 g != 0 -> inner g y = - level ->
  gain eta a y = gain eta a (linear_step eta level g a)
    - (2%:R * eta)^-1 * norm2 (y - linear_step eta level g a).
Proof.
move=> eta0 g0 gy; have gx := linear_step_level eta level a g0.
set x := linear_step eta level g a in gx *; pose h := y - x.
have gh : inner g h = 0 by rewrite /h innerBr gy gx subrr.
have xh : inner x h = eta * inner a h.
  by rewrite /x /linear_step innerBl !innerZl innerBl innerZl gh !mulr0 !subr0.
rewrite -/h (_ : y = x + h); last by rewrite /h addrC subrK.
rewrite /gain innerDr norm2D xh; set r := _^-1.
have -> : r * (norm2 x + 2%:R * (eta * inner a h) + norm2 h)
    = r * norm2 x + inner a h + r * norm2 h.
  rewrite !mulrDr; congr (_ + _ + _).
  by rewrite [2%:R * _]mulrA mulrA /r mulVf ?mul1r // mulf_neq0 ?pnatr_eq0 ?gt_eqF.
by rewrite !opprD !addrA; congr (_ - _); rewrite addrAC addrK.
Qed.

End Linearised.
