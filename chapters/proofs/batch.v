(** The level set of the batch is not that of other data. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius projector.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-batch: distributions with infinitely many values: the probability space is
    finite here. *)

Section Moment.
Variables (F : realFieldType) (Omega : finType) (p : Omega -> F).
Hypothesis p_ge0 : forall w, 0 <= p w.

(** The expectation of a random number f; p holds the probabilities. *)
Definition expectation (f : Omega -> F) : F := \sum_w p w * f w.

Variables (d : nat) (x : Omega -> 'cV[F]_d).

(** The second moment of the random input x: the expectation of x x^T. *)
Definition second_moment : 'M[F]_d := \sum_w p w *: (x w *m (x w)^T).

(** The mean square of the drift of the outputs is the trace of dW C dW^T, C the second moment.

    verifies: thm-batch *)
Theorem drift_is_trace m (dW : 'M[F]_(m, d)) :
  expectation (fun w => norm2 (dW *m x w)) = \tr (dW *m second_moment *m dW^T).
Proof.
rewrite /second_moment mulmx_sumr mulmx_suml raddf_sum; apply: eq_bigr => w _ /=.
rewrite -scalemxAr -scalemxAl mxtraceZ; congr (_ * _).
by rewrite /norm2 /inner trmx_mul mxtrace_mulC !mulmxA.
Qed.

Lemma le_expectation f h : (forall w, f w <= h w) -> expectation f <= expectation h.
Proof. by move=> le; apply: ler_sum => w _; exact: ler_wpmul2l. Qed.

(** If P is symmetric and idempotent, then the trace of P C is the mean square of P x, and with
    dW = G P and a bound s of the spectral norm of dW, the mean square of the drift is at most
    s^2 tr(P C).

    verifies: thm-batch *)
Theorem drift_bound m (G : 'M[F]_(m, d)) (P : 'M[F]_d) s :
  P^T = P -> P *m P = P -> (forall y : 'cV_d, norm2 (G *m P *m y) <= s ^+ 2 * norm2 y) ->
  \tr (P *m second_moment) = expectation (fun w => norm2 (P *m x w)) /\
  expectation (fun w => norm2 (G *m P *m x w)) <= s ^+ 2 * \tr (P *m second_moment).
Proof.
move=> sym idem bound.
have trace : \tr (P *m second_moment) = expectation (fun w => norm2 (P *m x w)).
  by rewrite drift_is_trace sym [RHS]mxtrace_mulC mulmxA idem.
split=> //; rewrite trace /expectation mulr_sumr; apply: ler_sum => w _.
rewrite mulrCA; apply: ler_wpmul2l => //.
by have := bound (P *m x w); rewrite mulmxA -(mulmxA G) idem.
Qed.

End Moment.

Section Monotone.
Variables (F : realFieldType) (d : nat).

(** The more inputs the batch holds, the shorter is what is left of any input: if the span of R is
    inside that of R', then P' x is no longer than P x.

    verifies: thm-batch *)
Theorem more_inputs n n' (P P' : 'M[F]_d) (R : 'M_(d, n)) (R' : 'M_(d, n')) (x : 'cV_d) :
  null_projector P R -> null_projector P' R' -> (R^T <= R'^T)%MS ->
  norm2 (P' *m x) <= norm2 (P *m x).
Proof.
move=> proj proj' inside; have [sym' idem' _] := proj'.
have <- : P' *m P = P'.
  apply/(fixed_iff_admissible _ proj); apply: killed_by_span inside _.
  exact: projector_kills.
rewrite -mulmxA; set y := P *m x; have := norm2_ge0 (y - P' *m y).
have -> : norm2 (y - P' *m y) = norm2 y - norm2 (P' *m y).
  rewrite /norm2 innerBl !innerBr.
  have -> : inner (P' *m y) (P' *m y) = inner y (P' *m y).
    by rewrite inner_mull mulmxA sym' idem' innerC.
  by rewrite [inner (P' *m y) y]innerC subrr subr0.
by rewrite subr_ge0.
Qed.

End Monotone.

Section Next.
Variables (F : fieldType) (d : nat).

(** The span of the first n inputs of a sequence, as rows. *)
Definition span_of (x : nat -> 'rV[F]_d) n : 'M[F]_d := (\sum_(i < n) <<x i>>)%MS.

(** Among the first m inputs at most d have a part outside the span of those before.

    verifies: thm-batch *)
Theorem at_most_d_are_new (x : nat -> 'rV[F]_d) m :
  (\sum_(n < m) ~~ (x n <= span_of x n)%MS <= d)%N.
Proof.
apply: (@leq_trans (\rank (span_of x m))); last exact: rank_leq_col.
elim: m => [|m IH]; first by rewrite big_ord0.
rewrite big_ord_recr /=; set S := span_of x m in IH *.
have -> : \rank (span_of x m.+1) = \rank (S + x m)%MS.
  by rewrite /span_of big_ord_recr /= -/(span_of x m); rewrite (adds_eqmx (eqmx_refl S) (genmxE (x m))).
have [inside|outside] := boolP (x m <= S)%MS.
  by rewrite addn0 (leq_trans IH) // mxrankS ?addsmxSl.
rewrite addn1; apply: leq_ltn_trans IH _; rewrite ltnNge; apply: contra outside => le.
by rewrite (submx_trans (addsmxSr S (x m))) // -(geq_leqif (mxrank_leqif_sup (addsmxSl S (x m)))).
Qed.

(** The probability that the input with number n has a part outside the span of those before, if the
    inputs x and the probabilities p depend on an outcome w. *)
Definition new_probability (K : realFieldType) (Omega : finType) (p : Omega -> K)
    (x : Omega -> nat -> 'rV[F]_d) n : K :=
  expectation p (fun w => (~~ (x w n <= span_of (x w) n)%MS)%:R).

(** So on average over n = 0, ..., m - 1 the probability that the next input has a part outside the
    span of the n before is at most d / m.

    verifies: thm-batch *)
Theorem next_is_new (K : realFieldType) (Omega : finType) (p : Omega -> K)
    (x : Omega -> nat -> 'rV[F]_d) m : (forall w, 0 <= p w) -> \sum_w p w = 1 -> (0 < m)%N ->
  (m%:R^-1 * (\sum_(n < m) new_probability p x n) <= d%:R / m%:R)%R.
Proof.
move=> p_ge0 p1 m_gt0; rewrite mulrC ler_pmul2r ?invr_gt0 ?ltr0n //.
rewrite /new_probability /expectation exchange_big /= -[d%:R]mul1r -[X in X * d%:R]p1 mulr_suml; apply: ler_sum => w _.
rewrite -mulr_sumr; apply: ler_wpmul2l => //.
by have := at_most_d_are_new (x w) m; rewrite -(ler_nat K) natr_sum.
Qed.

End Next.
