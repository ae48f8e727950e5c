(** The paper's claim that the gradient of T lies in the span of the inputs is false: a network of two
    layers with one unit each, over the rational numbers. *)
From mathcomp Require Import all_ssreflect all_algebra.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Network.
Variable R : comRingType.

(** The network at the sample 1 with the target 0: the hidden unit h = w1 + b1, and its output
    w2 h + b2, which is the residual. The loss is half its square. *)
Definition hidden (w1 b1 : R) : R := w1 + b1.
Definition residual (w1 b1 w2 b2 : R) : R := w2 * hidden w1 b1 + b2.

(** The gradient of the loss by w1, b1, w2, b2, and twice T: the sum of its squares. *)
Definition slopes (w1 b1 w2 b2 : R) : R * R * R * R :=
  let r := residual w1 b1 w2 b2 in (r * w2, r * w2, r * hidden w1 b1, r).
Definition twice_T (w1 b1 w2 b2 : R) : R :=
  let: (a, b, c, d) := slopes w1 b1 w2 b2 in a ^+ 2 + b ^+ 2 + c ^+ 2 + d ^+ 2.

End Network.

(** At w1 = 1, b1 = 0, w2 = 1, b2 = 0 the second layer has the input (1, 1), and the change (1, -1)
    of its weights is admissible: along it the residual, and with it the loss, does not change. If
    the gradient of T lay in the span of the input, T would not change to first order either. But 2 T
    is 2 (1 + s)^2 + 2, and its slope at s = 0 is 4.

    verifies: thm-survivor *)
Theorem claim_fails :
  let s : {poly rat} := 'X in
  residual 1 0 (1 + s) (- s) = 1 /\ (twice_T 1 0 (1 + s) (- s))^`().[0] = 4%:R.
Proof.
move=> s; have r : residual 1 0 (1 + s) (- s) = 1.
  by rewrite /residual /hidden addr0 mulr1 addrK.
split=> //; rewrite /twice_T /slopes r /hidden addr0 !mul1r !expr1n.
rewrite !derivD !derivC expr2 derivM derivD derivC derivX add0r mul1r mulr1 !addr0.
by rewrite !hornerE.
Qed.
