(** Drift bound. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-drift: the spectral norm enters as any bound of it; how the library bounds it,
    and that exp and log have the properties named below, is not proved. *)

Section Layer.
Variable F : realFieldType.

(** s bounds the spectral norm of A: no vector becomes longer than s times its length. *)
Definition spectral_bound m n (A : 'M[F]_(m, n)) (s : F) : Prop :=
  forall x : 'cV_n, norm2 (A *m x) <= s ^+ 2 * norm2 x.

Lemma norm2_columns m n (A : 'M[F]_(m, n)) : norm2 A = \sum_j norm2 (col j A).
Proof.
rewrite /norm2 innerE exchange_big; apply: eq_bigr => j _ /=.
by rewrite innerE; apply: eq_bigr => i _; rewrite big_ord1 !mxE.
Qed.

(** The norm of a product: |A C|_F <= |A|_2 |C|_F, squared. *)
Lemma norm2_mul m n k (A : 'M[F]_(m, n)) (C : 'M_(n, k)) s :
  spectral_bound A s -> norm2 (A *m C) <= s ^+ 2 * norm2 C.
Proof.
move=> bound; rewrite !norm2_columns mulr_sumr; apply: ler_sum => j _.
have -> : col j (A *m C) = A *m col j C; last exact: bound.
by apply/colP => i; rewrite !mxE; apply: eq_bigr => l _; rewrite mxE.
Qed.

(** One layer: dW = G P with P idempotent; if P leaves at most the share 1 - tau of the energy of
    the inputs R, the outputs move by at most |dW|_2 sqrt(1 - tau) |R|_F. All is squared.

    verifies: thm-drift *)
Theorem layer_drift m d n (G : 'M[F]_(m, d)) (P : 'M[F]_d) (R : 'M[F]_(d, n)) s tau :
  P *m P = P -> spectral_bound (G *m P) s -> norm2 (P *m R) <= (1 - tau) * norm2 R ->
  norm2 (G *m P *m R) <= s ^+ 2 * norm2 (P *m R) /\
  norm2 (G *m P *m R) <= s ^+ 2 * ((1 - tau) * norm2 R).
Proof.
move=> idem bound share.
have le : norm2 (G *m P *m R) <= s ^+ 2 * norm2 (P *m R).
  by have := norm2_mul (P *m R) bound; rewrite mulmxA -(mulmxA G) idem.
by split=> //; apply: le_trans le _; apply: ler_wpmul2l share; exact: sqr_ge0.
Qed.

(** An activation sigma that acts entry by entry with the Lipschitz constant kappa. *)
Definition lipschitz (sigma : F -> F) (kappa : F) : Prop :=
  forall a b, (sigma a - sigma b) ^+ 2 <= kappa ^+ 2 * (a - b) ^+ 2.

Lemma activation_drift m n (Z Z' : 'M[F]_(m, n)) sigma kappa : lipschitz sigma kappa ->
  norm2 (map_mx sigma Z' - map_mx sigma Z) <= kappa ^+ 2 * norm2 (Z' - Z).
Proof.
move=> lip; rewrite /norm2 !innerE mulr_sumr; apply: ler_sum => i _; rewrite mulr_sumr.
by apply: ler_sum => j _; rewrite !mxE -!expr2; exact: lip.
Qed.

End Layer.

Section Chain.
Variable F : rcfType.

(** The Frobenius norm. *)
Definition norm m n (A : 'M[F]_(m, n)) : F := Num.sqrt (norm2 A).

Lemma norm_ge0 m n (A : 'M[F]_(m, n)) : 0 <= norm A.
Proof. exact: sqrtr_ge0. Qed.

Lemma norm_sqr m n (A : 'M[F]_(m, n)) : norm A ^+ 2 = norm2 A.
Proof. by rewrite sqr_sqrtr // norm2_ge0. Qed.

Lemma norm_le m n (A : 'M[F]_(m, n)) s x : 0 <= s -> 0 <= x ->
  norm2 A <= s ^+ 2 * x ^+ 2 -> norm A <= s * x.
Proof.
move=> s0 x0 le; rewrite -(@ler_pexpn2r _ 2) ?nnegrE ?norm_ge0 ?mulr_ge0 //.
by rewrite norm_sqr exprMn.
Qed.

(** The triangle inequality. *)
Lemma norm_triangle m n (A B : 'M[F]_(m, n)) : norm (A + B) <= norm A + norm B.
Proof.
rewrite -(@ler_pexpn2r _ 2) ?nnegrE ?norm_ge0 ?addr_ge0 ?norm_ge0 //.
rewrite norm_sqr norm2D sqrrD !norm_sqr mulr_natl ler_add2r ler_add2l ler_pmuln2r //.
apply: le_trans (ler_norm _) _.
rewrite -(@ler_pexpn2r _ 2) ?nnegrE ?normr_ge0 ?mulr_ge0 ?norm_ge0 //.
by rewrite real_normK ?num_real // exprMn !norm_sqr cauchy_schwarz.
Qed.

(** The inputs of a layer: the activation of the outputs Z of the layer before, and below them a row
    of ones for the bias. *)
Definition inputs m n (sigma : F -> F) (Z : 'M[F]_(m, n)) : 'M[F]_(m + 1, n) :=
  col_mx (map_mx sigma Z) (const_mx 1).

(** One link of the chain. The weights are [U, c], their change [dU, dc], the inputs sigma(Z) with a
    row of ones below; Z' and Z are the outputs of the layer before, after and before the move. The
    outputs move by at most |U + dU|_2 kappa times what those of the layer before moved by, plus
    what the change does to the old inputs.

    verifies: thm-drift *)
Theorem link m k n (U dU : 'M[F]_(m, k)) (c dc : 'cV[F]_m) (Z Z' : 'M[F]_(k, n)) sigma kappa s :
  0 <= s -> 0 <= kappa -> spectral_bound (U + dU) s -> lipschitz sigma kappa ->
  norm ((row_mx U c + row_mx dU dc) *m inputs sigma Z' - row_mx U c *m inputs sigma Z)
    <= s * kappa * norm (Z' - Z) + norm (row_mx dU dc *m inputs sigma Z).
Proof.
move=> s0 k0 bound lip.
have -> : (row_mx U c + row_mx dU dc) *m inputs sigma Z' - row_mx U c *m inputs sigma Z
    = (U + dU) *m (map_mx sigma Z' - map_mx sigma Z) + row_mx dU dc *m inputs sigma Z.
  have -> : (U + dU) *m (map_mx sigma Z' - map_mx sigma Z)
      = (row_mx U c + row_mx dU dc) *m (inputs sigma Z' - inputs sigma Z).
    by rewrite /inputs opp_col_mx !add_col_mx subrr add_row_mx mul_row_col mulmx0 addr0.
  by rewrite mulmxBr [in X in _ - X + _]mulmxDl opprD addrA subrK.
apply: le_trans (norm_triangle _ _) _; rewrite ler_add2r -mulrA.
apply: norm_le => //; first by rewrite mulr_ge0 ?norm_ge0.
apply: le_trans (norm2_mul _ bound) _; apply: ler_wpmul2l; first exact: sqr_ge0.
by rewrite exprMn norm_sqr; exact: activation_drift.
Qed.

(** The chain: if e_0 = 0 and e_(l+1) <= a_l e_l + b_l with a_l >= 0, then e_N is at most the sum
    over l of b_l times all later factors a_m. With a_l and b_l from the theorems above this is the
    book's bound for the network.

    verifies: thm-drift *)
Theorem chain (e a b : nat -> F) N : e 0%N = 0 -> (forall l, 0 <= a l) ->
  (forall l, e l.+1 <= a l * e l + b l) ->
  e N <= \sum_(l < N) (\prod_(l.+1 <= m < N) a m) * b l.
Proof.
move=> e0 a0 step; elim: N => [|N IH]; first by rewrite e0 big_ord0.
apply: le_trans (step N) _; rewrite big_ord_recr /= big_geq // mul1r ler_add2r.
apply: le_trans (ler_wpmul2l (a0 N) IH) _; rewrite mulr_sumr.
apply: ler_sum => l _; rewrite (big_nat_recr _ _ _ (ltn_ord l)) /=.
by rewrite [X in _ <= X * _]mulrC mulrA.
Qed.

End Chain.

Lemma has_max (F : realDomainType) k (f : 'I_k.+1 -> F) : exists i, forall j, f j <= f i.
Proof.
elim: k f => [|k IH] f; first by exists ord0 => j; rewrite ord1.
have [i max] := IH (fun j => f (lift ord0 j)).
have [le|lt] := lerP (f ord0) (f (lift ord0 i)).
  by exists (lift ord0 i) => j; case: (unliftP ord0 j) => [j'|] ->.
exists ord0 => j; case: (unliftP ord0 j) => [j'|] -> //.
exact: le_trans (max j') (ltW lt).
Qed.

Section CrossEntropy.
Variables (F : realFieldType) (exp ln : F -> F).
Hypothesis exp_gt0 : forall a, 0 < exp a.
Hypothesis expD : forall a b, exp (a + b) = exp a * exp b.
Hypothesis exp_le : forall a b, a <= b -> exp a <= exp b.
Hypothesis ln_le : forall a b, 0 < a -> a <= b -> ln a <= ln b.
Hypothesis ln_exp : forall a b, 0 < b -> ln (exp a * b) = a + ln b.
Variable k : nat.
Implicit Types z q v : 'cV[F]_k.+1.

(** The logarithm of the sum of the exponentials of the outputs z. *)
Definition lse z : F := ln (\sum_i exp (z i 0)).

(** The cross-entropy of the softmax of z with the true distribution q. *)
Definition cross_entropy q z : F := lse z - inner q z.

Lemma lse_le z v c : (forall i, v i 0 <= c) -> lse (z + v) <= c + lse z.
Proof.
have positive (y : 'cV[F]_k.+1) : 0 < \sum_i exp (y i (0 : 'I_1)).
  rewrite (bigD1 ord0) //= ltr_paddr ?exp_gt0 //.
  by apply: sumr_ge0 => i _; exact: ltW.
move=> le; rewrite /lse -ln_exp //; apply: ln_le; first exact: positive.
rewrite mulr_sumr; apply: ler_sum => i _; rewrite mxE addrC expD.
by apply: ler_wpmul2r (exp_le (le i)); exact: ltW.
Qed.

(** If the outputs of one sample move by v, its cross-entropy moves by at most sqrt 2 |v|; squared.

    verifies: thm-drift *)
Theorem cross_entropy_drift q z v : (forall i, 0 <= q i 0) -> \sum_i q i 0 = 1 ->
  (cross_entropy q (z + v) - cross_entropy q z) ^+ 2 <= 2%:R * norm2 v.
Proof.
move=> q0 q1; have [top max] := has_max (fun i => v i 0).
have [bot] := has_max (fun i => - v i 0) => min.
have {}min i : v bot 0 <= v i 0 by rewrite -ler_opp2; exact: min.
set M := v top 0 in max; set m := v bot 0 in min.
have mean : m <= inner q v <= M.
  have -> : inner q v = \sum_i q i 0 * v i 0.
    by rewrite innerE; apply: eq_bigr => i _; rewrite big_ord1.
  apply/andP; split.
    by rewrite -[m]mul1r -q1 mulr_suml; apply: ler_sum => i _; exact: ler_wpmul2l.
  by rewrite -[M]mul1r -q1 mulr_suml; apply: ler_sum => i _; exact: ler_wpmul2l.
have change : cross_entropy q (z + v) - cross_entropy q z = lse (z + v) - lse z - inner q v.
  rewrite /cross_entropy innerDr opprD opprB [lse (z + v) + _]addrA.
  by rewrite [lse (z + v) - _ - _]addrAC addrA subrK addrAC.
have up : lse (z + v) - lse z <= M by rewrite ler_subl_addr; exact: lse_le.
have down : m <= lse (z + v) - lse z.
  rewrite -[m]opprK lter_oppl opprB ler_subl_addr -{1}[z](addrK v).
  by apply: lse_le => i; rewrite mxE ler_opp2.
have [mq qM] := andP mean.
have bound : (cross_entropy q (z + v) - cross_entropy q z) ^+ 2 <= (M - m) ^+ 2.
  rewrite change -real_normK ?num_real // ler_expn2r ?nnegrE ?normr_ge0 //.
    by rewrite subr_ge0; exact: le_trans mq qM.
  by rewrite ler_norml opprB ler_sub //= ler_sub.
apply: le_trans bound _; have [same|differ] := eqVneq top bot.
  by rewrite /M /m same subrr expr0n /= mulr_ge0 ?ler0n ?norm2_ge0.
have long : M ^+ 2 + m ^+ 2 <= norm2 v.
  rewrite /norm2 innerE (bigD1 top) //= big_ord1 -expr2 ler_add2l.
  rewrite (bigD1 bot) 1?eq_sym //= big_ord1 -expr2 ler_addl.
  by apply: sumr_ge0 => i _; rewrite big_ord1; exact: sqr_ge0.
apply: (@le_trans _ _ (2%:R * (M ^+ 2 + m ^+ 2))); last by apply: ler_wpmul2l long; exact: ler0n.
rewrite -subr_ge0; have -> : 2%:R * (M ^+ 2 + m ^+ 2) - (M - m) ^+ 2 = (M + m) ^+ 2.
  rewrite sqrrB sqrrD; set t := M * m *+ 2; rewrite mulr_natl mulr2n.
  by rewrite [M ^+ 2 - t + _]addrAC opprB [t - _]addrC addrA addrK addrAC.
exact: sqr_ge0.
Qed.

(** The mean cross-entropy of the samples whose outputs are the columns of Z. *)
Definition mean_cross_entropy n (q : 'I_n.+1 -> 'cV[F]_k.+1) (Z : 'M[F]_(k.+1, n.+1)) : F :=
  n.+1%:R^-1 * \sum_j cross_entropy (q j) (col j Z).

(** The mean cross-entropy of n samples, whose outputs are the columns of Z, moves by at most
    sqrt (2 / n) |Z' - Z|_F; squared.

    verifies: thm-drift *)
Theorem mean_cross_entropy_drift n (q : 'I_n.+1 -> 'cV[F]_k.+1) (Z Z' : 'M[F]_(k.+1, n.+1)) :
  (forall j i, 0 <= q j i 0) -> (forall j, \sum_i q j i 0 = 1) ->
  (mean_cross_entropy q Z' - mean_cross_entropy q Z) ^+ 2 <= 2%:R / n.+1%:R * norm2 (Z' - Z).
Proof.
move=> q0 q1; rewrite /mean_cross_entropy -mulrBr -sumrB exprMn.
pose change : 'rV[F]_n.+1 := \row_j (cross_entropy (q j) (col j Z') - cross_entropy (q j) (col j Z)).
have -> : \sum_j (cross_entropy (q j) (col j Z') - cross_entropy (q j) (col j Z))
    = inner change (const_mx 1).
  by rewrite innerE big_ord1; apply: eq_bigr => j _; rewrite !mxE mulr1.
have ones : norm2 (const_mx 1 : 'rV[F]_n.+1) = n.+1%:R.
  rewrite /norm2 innerE big_ord1 (eq_bigr (fun=> 1)) => [|j _]; last by rewrite !mxE mulr1.
  by rewrite sumr_const card_ord.
have le : norm2 change <= 2%:R * norm2 (Z' - Z).
  rewrite norm2_columns [X in _ * X]norm2_columns mulr_sumr; apply: ler_sum => j _.
  have -> : norm2 (col j change) = change 0 j ^+ 2 by rewrite /norm2 innerE !big_ord1 !mxE -expr2.
  have {1}-> : col j (Z' - Z) = col j Z' - col j Z by apply/colP => i; rewrite !mxE.
  have := @cross_entropy_drift (q j) (col j Z) (col j Z' - col j Z) (q0 j) (q1 j).
  by rewrite [col j Z + _]addrC subrK mxE.
have := cauchy_schwarz change (const_mx 1); rewrite ones => cs.
apply: le_trans (ler_wpmul2l (sqr_ge0 _) cs) _.
have -> : n.+1%:R^-1 ^+ 2 * (norm2 change * n.+1%:R) = norm2 change * n.+1%:R^-1.
  by rewrite expr2 -mulrA [norm2 change * _]mulrC mulKf ?pnatr_eq0 // mulrC.
by apply: le_trans (ler_wpmul2r _ le) _; rewrite ?invr_ge0 ?ler0n // mulrAC.
Qed.


End CrossEntropy.
