(** What a teleport can save: a loss that is quadratic on a line, and steps along it. *)
From mathcomp Require Import all_ssreflect all_algebra.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-saving: part 2 in logarithms, and for growths whose square is no whole number:
    here is compared what steps leave of the slope; and the limit of small strides. *)

Section Saving.
Variable F : realFieldType.
Implicit Types (a k s c : F) (m n : nat).

(** Twice what the loss has fallen by at s, on a line along which it falls by a at first, with the
    stride k: of L - a s + a k s^2 / 2. *)
Definition twice_fall a k s : F := a * (s *+ 2 - k * s ^+ 2).

(** The lowest point is where k s = 1; from there it rises as a square. *)
Lemma twice_fallE a k s : k * twice_fall a k s = a - a * (1 - k * s) ^+ 2.
Proof.
have -> x : a - a * x = a * (1 - x) by rewrite mulrBr mulr1.
rewrite /twice_fall mulrCA; congr (a * _).
by rewrite sqrrB expr1n mul1r opprD addrA subKr exprMn mulrBr mulrnAr mulrA -expr2.
Qed.

(** The loss falls nowhere by more than a / (2 k), what it falls by at k s = 1.

    verifies: thm-saving *)
Theorem lowest a k s : 0 <= a -> k * twice_fall a k s <= a.
Proof. by move=> a0; rewrite twice_fallE ler_subl_addr ler_addl mulr_ge0 ?sqr_ge0. Qed.

(** There it does fall by so much.

    verifies: thm-saving *)
Theorem lowest_reached a k s : k * s = 1 -> k * twice_fall a k s = a.
Proof. by move=> ks; rewrite twice_fallE ks subrr expr0n mulr0 subr0. Qed.

(** After a teleport by the growth gamma, with c = gamma^2, the first-order fall is c times as large
    and the stride k' at least c times: then the loss falls nowhere on the new line by more than on
    the old one.

    verifies: thm-saving *)
Theorem no_lower a k k' c s : 0 <= a -> 0 < k -> 0 < c -> c * k <= k' ->
  k * twice_fall (c * a) k' s <= a.
Proof.
move=> a0 k0 c0 ck; case: (leP (twice_fall (c * a) k' s) 0) => [low|pos].
  by apply: le_trans a0; rewrite pmulr_rle0.
rewrite -(ler_pmul2l c0); have := lowest k' s (mulr_ge0 (ltW c0) a0).
by apply: le_trans; rewrite mulrA ler_pmul2r.
Qed.

(** A step goes on by what is left of the slope, 1 - k s. So each leaves the share 1 - k of it.

    verifies: thm-saving *)
Theorem slope_left k n : 1 - k * iter n (fun s => s + (1 - k * s)) 0 = (1 - k) ^+ n.
Proof.
elim: n => [|n IH]; first by rewrite mulr0 subr0 expr0.
rewrite exprSr -IH iterS; move: (iter _ _ _) => s.
by rewrite [k * (s + _)]mulrDr opprD addrA [RHS]mulrBr mulr1 [k * (1 - _)]mulrC.
Qed.

(** Bernoulli's inequality. *)
Lemma bernoulli k m : 0 <= k <= 1 -> 1 - k *+ m <= (1 - k) ^+ m.
Proof.
case/andP=> k0 k1; elim: m => [|m IH]; first by rewrite mulr0n subr0 expr0.
rewrite exprSr; apply: le_trans (ler_wpmul2r _ IH); last by rewrite subr_ge0.
rewrite mulrBr mulr1 mulrBl mul1r opprB mulrSr opprD addrA [in X in X <= _]addrA.
by rewrite ler_add2r ler_addl mulr_ge0 ?mulrn_wge0.
Qed.

(** With the square m of the growth a whole number and k' = m k <= 1: after n steps no more is left
    of the slope than m n steps before the teleport leave. So it takes n / m steps at most.

    verifies: thm-saving *)
Theorem sooner k m n : 0 <= k <= 1 -> k *+ m <= 1 -> (1 - k *+ m) ^+ n <= (1 - k) ^+ (m * n).
Proof.
move=> k01 mk; rewrite exprM ler_expn2r ?nnegrE ?subr_ge0 ?bernoulli //.
by rewrite exprn_ge0 // subr_ge0; case/andP: k01.
Qed.

(** With a stride above 2 the next step raises the loss.

    verifies: thm-saving *)
Theorem overshoot a k : 0 < a -> 2%:R < k -> twice_fall a k 1 < 0.
Proof. by move=> a0 k2; rewrite /twice_fall expr1n mulr1 pmulr_rlt0 // subr_lt0. Qed.

End Saving.
