(** The inner product of two matrices and the squared length that belongs to it. *)
From mathcomp Require Import all_ssreflect all_algebra.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Inner.
Variable R : comRingType.

(** The inner product of two matrices of one shape: the trace of A^T B. *)
Definition inner m n (A B : 'M[R]_(m, n)) : R := \tr (A^T *m B).

(** The squared Frobenius norm. *)
Definition norm2 m n (A : 'M[R]_(m, n)) : R := inner A A.

(** It is the sum over all entries of the products. *)
Lemma innerE m n (A B : 'M[R]_(m, n)) : inner A B = \sum_i \sum_j A i j * B i j.
Proof.
rewrite /inner /mxtrace exchange_big /=; apply: eq_bigr => j _.
by rewrite mxE; apply: eq_bigr => i _; rewrite mxE.
Qed.

Lemma innerC m n (A B : 'M[R]_(m, n)) : inner A B = inner B A.
Proof. by rewrite /inner -mxtrace_tr trmx_mul trmxK. Qed.

Lemma innerDl m n (A B C : 'M[R]_(m, n)) : inner (A + B) C = inner A C + inner B C.
Proof. by rewrite /inner raddfD mulmxDl raddfD. Qed.

Lemma innerDr m n (A B C : 'M[R]_(m, n)) : inner A (B + C) = inner A B + inner A C.
Proof. by rewrite /inner mulmxDr raddfD. Qed.

Lemma innerNr m n (A B : 'M[R]_(m, n)) : inner A (- B) = - inner A B.
Proof. by rewrite /inner mulmxN raddfN. Qed.

Lemma innerNl m n (A B : 'M[R]_(m, n)) : inner (- A) B = - inner A B.
Proof. by rewrite innerC innerNr innerC. Qed.

Lemma innerBr m n (A B C : 'M[R]_(m, n)) : inner A (B - C) = inner A B - inner A C.
Proof. by rewrite innerDr innerNr. Qed.

Lemma innerBl m n (A B C : 'M[R]_(m, n)) : inner (A - B) C = inner A C - inner B C.
Proof. by rewrite innerDl innerNl. Qed.

Lemma innerZr m n a (A B : 'M[R]_(m, n)) : inner A (a *: B) = a * inner A B.
Proof. by rewrite /inner -scalemxAr mxtraceZ. Qed.

Lemma innerZl m n a (A B : 'M[R]_(m, n)) : inner (a *: A) B = a * inner A B.
Proof. by rewrite innerC innerZr innerC. Qed.

Lemma inner0r m n (A : 'M[R]_(m, n)) : inner A 0 = 0.
Proof. by rewrite /inner mulmx0 raddf0. Qed.

Lemma inner0l m n (A : 'M[R]_(m, n)) : inner 0 A = 0.
Proof. by rewrite innerC inner0r. Qed.

(** A factor on the left goes to the other side transposed. *)
Lemma inner_mull m n k (A : 'M[R]_(m, n)) (B : 'M_(m, k)) (C : 'M_(k, n)) :
  inner A (B *m C) = inner (B^T *m A) C.
Proof. by rewrite /inner trmx_mul trmxK mulmxA. Qed.

(** A factor on the right goes to the other side transposed. *)
Lemma inner_mulr m n k (A : 'M[R]_(m, n)) (B : 'M_(m, k)) (C : 'M_(k, n)) :
  inner A (B *m C) = inner (A *m C^T) B.
Proof. by rewrite /inner mulmxA mxtrace_mulC mulmxA trmx_mul trmxK. Qed.

Lemma inner_tr m n (A B : 'M[R]_(m, n)) : inner A^T B^T = inner A B.
Proof. by rewrite /inner -mxtrace_tr trmx_mul !trmxK mxtrace_mulC. Qed.

(** The inner product with the matrix that is 1 at one place and 0 elsewhere is the entry there. *)
Lemma inner_delta m n (A : 'M[R]_(m, n)) i j : inner A (delta_mx i j) = A i j.
Proof.
rewrite innerE (bigD1 i) //= (bigD1 j) //= mxE !eqxx mulr1 !big1 ?addr0 //.
  move=> k /negbTE ki; apply: big1 => l _; by rewrite mxE ki mulr0.
by move=> k /negbTE kj; rewrite mxE kj andbF mulr0.
Qed.

Lemma norm2_tr m n (A : 'M[R]_(m, n)) : norm2 A^T = norm2 A.
Proof. exact: inner_tr. Qed.

Lemma norm2Z m n a (A : 'M[R]_(m, n)) : norm2 (a *: A) = a ^+ 2 * norm2 A.
Proof. by rewrite /norm2 innerZl innerZr mulrA expr2. Qed.

Lemma norm2D m n (A B : 'M[R]_(m, n)) :
  norm2 (A + B) = norm2 A + 2%:R * inner A B + norm2 B.
Proof.
rewrite /norm2 innerDl !innerDr (innerC B A) mulr_natl mulr2n.
by rewrite !addrA.
Qed.

End Inner.

Section Ordered.
Variable R : realDomainType.

Lemma norm2_ge0 m n (A : 'M[R]_(m, n)) : 0 <= norm2 A.
Proof.
rewrite /norm2 innerE; apply: sumr_ge0 => i _; apply: sumr_ge0 => j _.
exact: sqr_ge0.
Qed.

(** Only the zero matrix has length 0. *)
Lemma norm2_eq0 m n (A : 'M[R]_(m, n)) : (norm2 A == 0) = (A == 0).
Proof.
apply/eqP/eqP => [|->]; last by rewrite /norm2 inner0r.
rewrite /norm2 innerE => /eqP; rewrite psumr_eq0; last first.
  by move=> i _; apply: sumr_ge0 => j _; exact: sqr_ge0.
move/allP=> zero; apply/matrixP => i j; rewrite mxE.
have := zero i (mem_index_enum i); rewrite psumr_eq0 /=; last by move=> k _; exact: sqr_ge0.
move/allP/(_ j (mem_index_enum j)); rewrite /= -expr2 sqrf_eq0.
by move/eqP.
Qed.

(** Cauchy's and Schwarz's inequality, squared. *)
Lemma cauchy_schwarz m n (A B : 'M[R]_(m, n)) : inner A B ^+ 2 <= norm2 A * norm2 B.
Proof.
have [/eqP|nonzero] := boolP (norm2 B == 0).
  move=> zero; move: (zero) => /eqP; rewrite norm2_eq0 => /eqP ->.
  by rewrite /norm2 !inner0r expr0n mulr0.
have positive : 0 < norm2 B by rewrite lt_def nonzero norm2_ge0.
have := norm2_ge0 (norm2 B *: A - inner A B *: B).
have -> : norm2 (norm2 B *: A - inner A B *: B)
  = norm2 B * (norm2 A * norm2 B - inner A B ^+ 2).
  rewrite -scaleNr norm2D !norm2Z innerZl innerZr sqrrN.
  set a := norm2 A; set c := norm2 B; set d := inner A B.
  have -> : 2%:R * (c * (- d * d)) = - (d ^+ 2 * c) - (d ^+ 2 * c).
    by rewrite mulNr !mulrN -expr2 (mulrC c) mulr_natl mulr2n opprD.
  by rewrite addrA subrK mulrBr [c * d ^+ 2]mulrC mulrCA -expr2 [c ^+ 2 * a]mulrC.
by rewrite pmulr_rge0 // subr_ge0.
Qed.

End Ordered.
