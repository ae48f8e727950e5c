(** Teleported gradients are Newton directions. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-newton: that a level set with a gradient other than 0 is a smooth surface, and
    that A has a basis of eigenvectors; both are taken as given. *)

Section Stationary.
Variables (F : realFieldType) (d : nat) (g : 'cV[F]_d) (H : 'M[F]_d).
Hypothesis g_neq0 : g != 0.

(** T is stationary along the level set: its gradient H g has no part along the tangent vectors t,
    which are orthogonal to g. *)
Definition stationary : Prop := forall t : 'cV[F]_d, inner g t = 0 -> inner (H *m g) t = 0.

(** That is the case exactly if g is an eigenvector of H.

    verifies: thm-newton *)
Theorem stationary_iff_eigenvector : stationary <-> exists c, H *m g = c *: g.
Proof.
have g2 : norm2 g != 0 by rewrite norm2_eq0.
split=> [still|[c Hg] t gt]; last by rewrite Hg innerZl gt mulr0.
pose c := inner g (H *m g) / norm2 g; exists c; pose t := H *m g - c *: g.
have gt : inner g t = 0 by rewrite /t innerBr innerZr /c divfK // subrr.
have : norm2 t == 0.
  by rewrite /norm2 {1}/t innerBl innerZl (still _ gt) gt mulr0 subrr.
by rewrite norm2_eq0 subr_eq0 => /eqP.
Qed.

(** And, if H is invertible, exactly if Newton's direction H^-1 g is a multiple of g.

    verifies: thm-newton *)
Theorem eigenvector_iff_newton : H \in unitmx ->
  (exists c, H *m g = c *: g) <-> (exists c, invmx H *m g = c *: g).
Proof.
have turn (A : 'M[F]_d) : A \in unitmx ->
    (exists c, A *m g = c *: g) -> exists c, invmx A *m g = c *: g.
  move=> unit [c Ag]; have gE : g = c *: (invmx A *m g) by rewrite scalemxAr -Ag mulmxA mulVmx // mul1mx.
  have c0 : c != 0 by apply: contra g_neq0 => /eqP c0; rewrite gE c0 scale0r.
  by exists c^-1; rewrite {2}gE scalerA mulVf // scale1r.
by move=> unit; split; [exact: turn | move/turn; rewrite unitmx_inv invmxK; apply].
Qed.

End Stationary.

Section Quadratic.
Variables (F : realFieldType) (d : nat).
Variables (A : 'M[F]_d) (U : 'M[F]_d) (lambda : 'rV[F]_d) (low high : F).
Hypotheses (orthogonal : U^T *m U = 1%:M) (diagonal : A = U *m diag_mx lambda *m U^T).
Hypotheses (positive : forall i, 0 < lambda 0 i).
Hypotheses (bounds : forall i, low <= lambda 0 i <= high).

Implicit Type z : 'cV[F]_d.
Let a z : 'cV[F]_d := U^T *m z.

Lemma value_coordinates z : inner z (A *m z) = \sum_i lambda 0 i * a z i 0 ^+ 2.
Proof.
rewrite diagonal -!mulmxA inner_mull -/(a z) innerE; move: (a z) => y.
apply: eq_bigr => i _; by rewrite big_ord1 mul_diag_mx mxE expr2 mulrCA.
Qed.

Lemma gradient_coordinates z :
  norm2 (A *m z) = \sum_i lambda 0 i * (lambda 0 i * a z i 0 ^+ 2).
Proof.
rewrite diagonal -!mulmxA /norm2 inner_mull (mulmxA U^T U) orthogonal mul1mx -/(a z) innerE.
move: (a z) => y; apply: eq_bigr => i _; rewrite big_ord1 mul_diag_mx !mxE.
by rewrite expr2 mulrACA -mulrA.
Qed.

(** On the level z^T A z = 2 c the squared gradient A z lies between 2 c times the smallest and the
    largest eigenvalue.

    verifies: thm-newton *)
Theorem gradient_bounds z c : inner z (A *m z) = 2%:R * c ->
  2%:R * c * low <= norm2 (A *m z) <= 2%:R * c * high.
Proof.
move=> <-; rewrite gradient_coordinates value_coordinates !mulr_suml.
have nonneg i : 0 <= lambda 0 i * a z i 0 ^+ 2.
  by rewrite mulr_ge0 ?sqr_ge0 // ltW.
apply/andP; split; apply: ler_sum => i _; have /andP[lo hi] := bounds i.
  by rewrite mulrC; exact: ler_wpmul2r.
by rewrite [X in _ <= X]mulrC; exact: ler_wpmul2r.
Qed.

(** The upper bound is reached exactly where z is an eigenvector to the largest eigenvalue.

    verifies: thm-newton *)
Theorem peak z c : inner z (A *m z) = 2%:R * c ->
  norm2 (A *m z) = 2%:R * c * high <-> A *m z = high *: z.
Proof.
move=> level; split=> [/eqP|eigen]; last first.
  by rewrite -level eigen /norm2 innerZl innerZr mulrC.
rewrite -level eq_sym -subr_eq0 gradient_coordinates value_coordinates mulr_suml -sumrB.
have nonneg i : 0 <= lambda 0 i * a z i 0 ^+ 2 * high - lambda 0 i * (lambda 0 i * a z i 0 ^+ 2).
  have /andP[_ hi] := bounds i; rewrite [X in _ - X]mulrC -mulrBr.
  by rewrite mulr_ge0 ?subr_ge0 // mulr_ge0 ?sqr_ge0 // ltW.
rewrite psumr_eq0 => [/allP zero|i _]; last exact: nonneg.
have at_i i : lambda 0 i * a z i 0 = high * a z i 0.
  have := zero i (mem_index_enum i); rewrite [X in _ - X]mulrC -mulrBr mulf_eq0 mulf_eq0.
  rewrite gt_eqF //= sqrf_eq0 subr_eq0.
  by case/orP=> /eqP; [move->; rewrite !mulr0 | move->].
have UU : U *m U^T = 1%:M by exact: mulmx1C.
rewrite diagonal -!mulmxA -/(a z).
have -> : diag_mx lambda *m a z = high *: a z.
  move: (a z) at_i => y at_i; rewrite mul_diag_mx; apply/colP => i.
  by rewrite [in LHS]mxE at_i [in RHS]mxE.
by rewrite -scalemxAr /a mulmxA UU mul1mx.
Qed.

(** There the gradient step with rate 1 / high is Newton's step: z - g / high is 0, the minimum.

    verifies: thm-newton *)
Theorem newton_step z : high != 0 -> A *m z = high *: z -> A \in unitmx ->
  z - high^-1 *: (A *m z) = 0 /\ high^-1 *: (A *m z) = invmx A *m (A *m z).
Proof.
move=> high0 eigen unit; have step : high^-1 *: (A *m z) = z.
  by rewrite eigen scalerA mulVf // scale1r.
by rewrite step subrr mulmxA mulVmx // mul1mx.
Qed.

End Quadratic.
