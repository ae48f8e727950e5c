(** The symmetry of LayerNorm. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-layernorm: the division by the square root of the variance: s below is any
    number. That every other gradient is made of the errors and values named here is the backward
    pass of span.v. *)

Section LayerNorm.
Variables (F : fieldType) (d m : nat).
Hypothesis d_neq0 : d%:R != 0 :> F.
Variables (gamma beta : 'cV[F]_d).
Hypothesis gamma_neq0 : forall j, gamma j 0 != 0.

(** A column of ones, and the sum of the entries of a column. *)
Definition ones : 'cV[F]_d := const_mx 1.
Definition total (x : 'cV[F]_d) : F := \sum_j x j 0.

(** Entry by entry: the product of two columns, and 1 / gamma. *)
Definition times (x y : 'cV[F]_d) : 'cV[F]_d := \col_j (x j 0 * y j 0).
Definition inverse : 'cV[F]_d := \col_j (gamma j 0)^-1.

(** The normalised column: a minus its mean, divided by s. *)
Definition normalised (s : F) (a : 'cV[F]_d) : 'cV[F]_d :=
  s^-1 *: (a - (total a / d%:R) *: ones).

(** The output of LayerNorm. *)
Definition layer_norm s a : 'cV[F]_d := times gamma (normalised s a) + beta.

(** The entries of the normalised column add up to 0.

    verifies: thm-layernorm *)
Theorem total_normalised s a : total (normalised s a) = 0.
Proof.
rewrite /total (eq_bigr (fun j => s^-1 * (a j 0 - total a / d%:R))) => [|j _].
  rewrite -mulr_sumr sumrB sumr_const card_ord -[X in _ - X]mulr_natr divfK //.
  by rewrite -/(total a) subrr mulr0.
by rewrite !mxE mulr1.
Qed.

(** So on all data the (h_j - beta_j) / gamma_j add up to 0.

    verifies: thm-layernorm *)
Theorem zero_sum s a : total (times inverse (layer_norm s a - beta)) = 0.
Proof.
rewrite -(total_normalised s a); apply: eq_bigr => j _.
by rewrite /layer_norm addrK !mxE mulKf.
Qed.

(** The move: W + u (1/gamma)^T and b - u sum_j beta_j / gamma_j. *)
Definition new_W (W : 'M[F]_(m, d)) (u : 'cV_m) := W + u *m inverse^T.
Definition new_b (b u : 'cV[F]_m) := b - total (times inverse beta) *: u.

Lemma inverse_dot (h : 'cV[F]_d) : inverse^T *m h = (total (times inverse h))%:M.
Proof.
by apply/matrixP => i j; rewrite !ord1 !mxE /= mulr1n; apply: eq_bigr => k _; rewrite !mxE.
Qed.

(** It changes the outputs for no a.

    verifies: thm-layernorm *)
Theorem outputs_stay W b u s a :
  new_W W u *m layer_norm s a + new_b b u = W *m layer_norm s a + b.
Proof.
rewrite /new_W /new_b mulmxDl -!addrA; congr (_ + _).
rewrite -mulmxA inverse_dot mul_mx_scalar addrCA -scalerBl.
suff -> : total (times inverse (layer_norm s a)) = total (times inverse beta).
  by rewrite subrr scale0r addr0.
apply/eqP; rewrite -subr_eq0 -sumrB; apply/eqP; rewrite -[RHS](zero_sum s a).
by rewrite /total; move: (layer_norm s a) => h; apply: eq_bigr => j _; rewrite !mxE mulrBr.
Qed.

(** The backward pass through these layers. With the error delta at the outputs z, the error at h
    is W^T delta, at the normalised column gamma times that, and the gradients by gamma and beta
    are its sums with the normalised column and by itself. *)
Definition error_h (W : 'M[F]_(m, d)) (delta : 'cV_m) : 'cV[F]_d := W^T *m delta.
Definition error_normalised W delta : 'cV[F]_d := times gamma (error_h W delta).
Definition grad_gamma W delta (ahat : 'cV[F]_d) : 'cV[F]_d := times (error_h W delta) ahat.
Definition grad_beta W delta : 'cV[F]_d := error_h W delta.

(** The gradients by gamma and beta change as the book says.

    verifies: thm-layernorm *)
Theorem noticed W u delta ahat :
  grad_gamma (new_W W u) delta ahat =
    grad_gamma W delta ahat + inner u delta *: times inverse ahat /\
  grad_beta (new_W W u) delta = grad_beta W delta + inner u delta *: inverse.
Proof.
have beta_part : grad_beta (new_W W u) delta = grad_beta W delta + inner u delta *: inverse.
  rewrite /grad_beta /error_h /new_W [(W + _)^T]raddfD /= mulmxDl; congr (_ + _).
  rewrite trmx_mul trmxK -mulmxA (_ : u^T *m delta = (inner u delta)%:M) ?mul_mx_scalar //.
  by rewrite [LHS]mx11_scalar /inner /mxtrace big_ord1.
split=> //; have := beta_part; rewrite /grad_beta /grad_gamma => ->.
by apply/colP => j; rewrite !mxE mulrDl mulrA.
Qed.

(** The error at the normalised column changes by a multiple of the column of ones.

    verifies: thm-layernorm *)
Theorem common_direction W u delta :
  error_normalised (new_W W u) delta = error_normalised W delta + inner u delta *: ones.
Proof.
have [_] := noticed W u delta 0; rewrite /grad_beta /error_normalised => ->.
by apply/colP => j; rewrite !mxE mulrDr mulrCA mulfV.
Qed.

(** What is before LayerNorm does not notice: the normalised column changes to first order only by
    columns adot whose entries add up to 0, and with these the new error has the same inner
    product. So no other gradient changes.

    verifies: thm-layernorm *)
Theorem unnoticed_before W u delta (adot : 'cV[F]_d) : total adot = 0 ->
  inner (error_normalised (new_W W u) delta) adot = inner (error_normalised W delta) adot.
Proof.
move=> zero; rewrite common_direction innerDl innerZl.
suff -> : inner ones adot = 0 by rewrite mulr0 addr0.
by rewrite -[RHS]zero innerE; apply: eq_bigr => j _; rewrite big_ord1 mxE mul1r.
Qed.

(** Such columns are all that there are: for any rule of derivatives, the slopes of the entries of
    a column whose sum is always 0 have the sum 0.

    verifies: thm-layernorm *)
Theorem slopes_add_up (S : comRingType) (slope : {additive S -> F}) (a : 'cV[S]_d) :
  \sum_j a j 0 = 0 -> total (map_mx slope a) = 0.
Proof.
move=> zero; rewrite /total (eq_bigr (fun j => slope (a j 0))) => [|j _]; last by rewrite mxE.
by rewrite -raddf_sum zero raddf0.
Qed.

End LayerNorm.
