(** Numerical rank: what is cut off is small, and the rank is never too large. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius drift.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-rank: that R R^T has an orthonormal basis of eigenvectors, which is given; part 2
    (right, given a gap); in part 4 that no smaller subspace will do (Ky Fan); part 5; and the rounding
    of the decomposition itself. *)

Section Rank.
Variables (F : realFieldType) (d n : nat) (R : 'M[F]_(d, n)).
Variables (U : 'M[F]_d) (sigma2 : 'rV[F]_d) (cut2 : F).

(** The columns of U are the left singular vectors of R, and sigma2 holds the squares of its singular
    values: U is orthogonal, and R R^T = U diag(sigma2) U^T. *)
Definition singular : Prop := U^T *m U = 1%:M /\ R *m R^T = U *m diag_mx sigma2 *m U^T.

(** A direction is kept if its singular value is above the cut: all is squared here. *)
Definition kept (i : 'I_d) : bool := cut2 < sigma2 0 i.

(** The numerical rank k. *)
Definition rank_k : nat := #|kept|.

(** P projects on the directions that are cut off: it is I - B B^T with the kept columns B of U. *)
Definition cut_off : 'M[F]_d := U *m diag_mx (\row_i (~~ kept i)%:R) *m U^T.

Hypothesis svd : singular.

Lemma orthogonal_tr : U *m U^T = 1%:M.
Proof. by case: svd => orthogonal _; exact: mulmx1C. Qed.

Lemma norm2_rotated m (A : 'M[F]_(m, d)) : norm2 (A *m U) = norm2 A.
Proof. by rewrite /norm2 inner_mulr -mulmxA orthogonal_tr mulmx1. Qed.

(** The squared length of A R is the sum over the singular directions. *)
Lemma norm2_energy m (A : 'M[F]_(m, d)) :
  norm2 (A *m R) = \sum_a \sum_i sigma2 0 i * (A *m U) a i ^+ 2.
Proof.
case: svd => _ energy; have -> : norm2 (A *m R) = inner (A *m U) (A *m U *m diag_mx sigma2).
  by rewrite /norm2 inner_mulr -(mulmxA A R) energy innerC !mulmxA inner_mulr trmxK.
rewrite innerE; apply: eq_bigr => a _; apply: eq_bigr => i _.
by rewrite mul_mx_diag; move: (A *m U) => M; rewrite mxE mulrA -expr2 mulrC.
Qed.

Lemma cut_off_rotated m (G : 'M[F]_(m, d)) a i :
  (G *m cut_off *m U) a i = (~~ kept i)%:R * (G *m U) a i.
Proof.
case: svd => orthogonal _; rewrite /cut_off -!mulmxA orthogonal mulmx1 mulmxA.
by rewrite mul_mx_diag; move: (G *m U) => M; rewrite !mxE mulrC.
Qed.

(** What is cut off is small: a move dW = G P changes the outputs on the batch by at most its norm
    times the cut c; squared.

    verifies: thm-rank *)
Theorem cut_off_is_small m (G : 'M[F]_(m, d)) :
  norm2 (G *m cut_off *m R) <= norm2 (G *m cut_off) * cut2.
Proof.
rewrite norm2_energy -(norm2_rotated (G *m cut_off)) [norm2 _]innerE mulr_suml.
apply: ler_sum => a _; rewrite mulr_suml; apply: ler_sum => i _.
rewrite -expr2 mulrC cut_off_rotated; have [k|] := boolP (kept i).
  by rewrite /= !mul0r expr0n !mulr0.
by rewrite -leNgt => le; apply: ler_wpmul2r le; exact: sqr_ge0.
Qed.

(** The energy rule: if the kept directions hold at least the share tau of the energy, then P leaves
    at most the share 1 - tau.

    verifies: thm-rank *)
Theorem energy_rule tau : tau * (\sum_i sigma2 0 i) <= \sum_(i | kept i) sigma2 0 i ->
  norm2 (cut_off *m R) <= (1 - tau) * norm2 R.
Proof.
move=> share; have [orthogonal energy] := svd.
have total : norm2 R = \sum_i sigma2 0 i.
  rewrite /norm2 /inner mxtrace_mulC energy mxtrace_mulC mulmxA orthogonal mul1mx.
  by rewrite mxtrace_diag.
have -> : norm2 (cut_off *m R) = \sum_(i | ~~ kept i) sigma2 0 i.
  rewrite /norm2 /inner mxtrace_mulC trmx_mul mulmxA -(mulmxA cut_off) energy.
  rewrite /cut_off !trmx_mul trmxK tr_diag_mx !mulmxA mxtrace_mulC !mulmxA.
  set D := diag_mx (\row_i _); set S := diag_mx sigma2.
  rewrite orthogonal mul1mx -(mulmxA D) orthogonal mulmx1 -(mulmxA (D *m S)) orthogonal mulmx1.
  rewrite /D /S !mulmx_diag mxtrace_diag [RHS]big_mkcond; apply: eq_bigr => i _.
  by rewrite !mxE; case: kept; rewrite /= ?mul0r ?mulr0 // !(mul1r, mulr1).
rewrite total mulrBl mul1r ler_subr_addl; apply: le_trans (ler_add share (lexx _)) _.
by rewrite [X in _ <= X](bigID kept).
Qed.

Lemma norm2_apply m k (A : 'M[F]_(m, k)) (x : 'cV_k) : norm2 (A *m x) <= norm2 A * norm2 x.
Proof.
rewrite [norm2 (A *m x)]innerE [norm2 A]innerE mulr_suml; apply: ler_sum => i _.
rewrite big_ord1 -expr2; have -> : (A *m x) i 0 = inner (row i A)^T x.
  by rewrite innerE mxE; apply: eq_bigr => j _; rewrite big_ord1 !mxE.
apply: le_trans (cauchy_schwarz _ _) _; rewrite norm2_tr [norm2 (row i A)]innerE big_ord1.
by apply: ler_wpmul2r; [exact: norm2_ge0 | apply: ler_sum => j _; rewrite !mxE].
Qed.

(** The norm of a product is at most the product of the norms; squared. *)
Lemma norm2_product m k l (A : 'M[F]_(m, k)) (B : 'M_(k, l)) : norm2 (A *m B) <= norm2 A * norm2 B.
Proof.
rewrite [norm2 (A *m B)]norm2_columns [norm2 B]norm2_columns mulr_sumr; apply: ler_sum => j _.
have -> : col j (A *m B) = A *m col j B; last exact: norm2_apply.
by apply/colP => i; rewrite !mxE; apply: eq_bigr => a _; rewrite mxE.
Qed.

(** Never too large: if R differs from R0 by E with |E|_F <= c, in the Frobenius norm, then the
    numerical rank of R is at most the rank of R0.

    verifies: thm-rank *)
Theorem never_too_large (R0 : 'M[F]_(d, n)) : norm2 (R - R0) <= cut2 -> (rank_k <= \rank R0)%N.
Proof.
move=> close; rewrite leqNgt; apply/negP => large; have [orthogonal _] := svd.
pose K : 'M[F]_(rank_k, d) := \matrix_(a, i) U i (enum_val a).
have KU a i : (K *m U) a i = (enum_val a == i)%:R.
  have := congr1 (fun M : 'M_d => M (enum_val a) i) orthogonal; rewrite !mxE => <-.
  by apply: eq_bigr => j _; rewrite !mxE.
have KK : K *m K^T = 1%:M.
  apply/matrixP => a b; rewrite !mxE -(inj_eq enum_val_inj) -KU mxE.
  by apply: eq_bigr => j _; rewrite !mxE.
have [y y0 yKR] : exists2 y : 'rV_rank_k, y != 0 & y *m (K *m R0) = 0.
  have /rowV0Pn[y /sub_kermxP yKR y0] : kermx (K *m R0) != 0.
    rewrite kermx_eq0 -row_leq_rank -ltnNge; apply: leq_ltn_trans large.
    exact: mxrankM_maxr.
  by exists y.
have same : norm2 (y *m K) = norm2 y by rewrite /norm2 inner_mulr -mulmxA KK mulmx1.
have short : norm2 (y *m K *m R) <= norm2 y * cut2.
  have -> : y *m K *m R = y *m K *m (R - R0) by rewrite mulmxBr -(mulmxA y K R0) yKR subr0.
  rewrite -same; apply: le_trans (ler_wpmul2l (norm2_ge0 _) close).
  exact: norm2_product.
have entry i : (y *m K *m U) 0 i = \sum_a y 0 a * (enum_val a == i)%:R.
  by rewrite -mulmxA mxE; apply: eq_bigr => a _; rewrite KU.
have energyE : norm2 (y *m K *m R) = \sum_a sigma2 0 (enum_val a) * y 0 a ^+ 2.
  rewrite norm2_energy big_ord1 (bigID (mem kept)) /= [X in _ + X]big1 ?addr0.
    rewrite big_enum_val; apply: eq_bigr => a _; congr (_ * _ ^+ 2).
    rewrite entry (bigD1 a) //= eqxx mulr1 big1 ?addr0 // => b /negbTE ba.
    by rewrite (inj_eq enum_val_inj) ba mulr0.
  move=> i out; rewrite entry big1 ?expr0n ?mulr0 // => a _.
  have [e|] := eqVneq (enum_val a) i; last by rewrite mulr0.
  by case/negP: out; rewrite -e enum_valP.
have above (a : 'I_rank_k) : 0 < sigma2 0 (enum_val a) - cut2.
  by rewrite subr_gt0; have := enum_valP a; rewrite unfold_in.
have long : norm2 y * cut2 < norm2 (y *m K *m R).
  rewrite energyE [norm2 y]innerE big_ord1 mulr_suml -subr_gt0 -sumrB.
  rewrite (eq_bigr (fun a => (sigma2 0 (enum_val a) - cut2) * y 0 a ^+ 2)) => [|a _]; last first.
    by rewrite mulrBl -expr2 [_ * cut2]mulrC.
  have nonneg a : 0 <= (sigma2 0 (enum_val a) - cut2) * y 0 a ^+ 2.
    by rewrite mulr_ge0 ?sqr_ge0 // ltW.
  rewrite lt_def sumr_ge0 ?andbT //.
  apply: contra y0; rewrite psumr_eq0 => [/allP zero|a _]; last exact: nonneg.
  apply/eqP/rowP => a; have := zero a (mem_index_enum a).
  by rewrite mulf_eq0 gt_eqF //= sqrf_eq0 mxE => /eqP.
by have := lt_le_trans long short; rewrite ltxx.
Qed.

End Rank.
