(** The gradient of T is H g, for polynomials. *)
From mathcomp Require Import all_ssreflect all_algebra.
From SsrMultinomials Require Import mpoly.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Hessian.
Variables (F : fieldType) (n : nat).
Hypothesis two : 2%:R != 0 :> F.

(** A loss that is a polynomial in the n weights, and its gradient: the partial derivatives. *)
Definition grad (p : {mpoly F[n]}) (i : 'I_n) : {mpoly F[n]} := p^`M(i).

(** The Hessian: the partial derivatives of the gradient. *)
Definition hessian (p : {mpoly F[n]}) (i j : 'I_n) : {mpoly F[n]} := (grad p i)^`M(j).

(** The book's objective T: half the sum of the squares of the gradient. *)
Definition objective (p : {mpoly F[n]}) : {mpoly F[n]} := 2%:R^-1 *: \sum_i grad p i ^+ 2.

(** The Hessian is symmetric.

    verifies: thm-survivor *)
Theorem hessian_symmetric p i j : hessian p i j = hessian p j i.
Proof. exact: mderiv_comm. Qed.

(** The gradient of T is H g.

    verifies: thm-survivor *)
Theorem gradient_of_objective p j :
  grad (objective p) j = \sum_i hessian p j i * grad p i.
Proof.
rewrite /grad /objective scaler_sumr raddf_sum; apply: eq_bigr => i _ /=.
rewrite mderivZ expr2 mderivM [X in _ *: (_ + X)]mulrC -mulr2n -scaler_nat scalerA mulVf // scale1r.
by rewrite hessian_symmetric.
Qed.

(** The loss on the line w + s v: a polynomial in s. *)
Definition on_line (w v : 'I_n -> F) (p : {mpoly F[n]}) : {poly F} :=
  mmap polyC (fun i => (w i)%:P + v i *: 'X) p.

(** At s = 0 it is the loss at w. *)
Lemma on_line_at0 w v p : (on_line w v p).[0] = p.@[w].
Proof.
rewrite /on_line /mmap /meval /mmap horner_sum; apply: eq_bigr => m _.
rewrite hornerM hornerC; congr (_ * _); rewrite /mmap1 horner_prod; apply: eq_bigr => i _.
by rewrite horner_exp hornerD hornerC hornerZ hornerX mulr0 addr0.
Qed.

(** The chain rule on a line: the slope at s = 0 is the inner product of the gradient at w with v.
    So H v is the derivative of the gradient along w + s v, and the slope of T along v is the inner
    product of grad T with v.

    verifies: thm-survivor thm-layerwise *)
Theorem slope_on_line w v p : (on_line w v p)^`().[0] = \sum_i (grad p i).@[w] * v i.
Proof.
pose good p := (on_line w v p)^`().[0] = \sum_i (grad p i).@[w] * v i.
have sums a b : good a -> good b -> good (a + b).
  rewrite /good /on_line raddfD derivD hornerD => -> ->; rewrite -big_split /=.
  by apply: eq_bigr => i _; rewrite /grad mderivD mevalD mulrDl.
have constants c : good c%:MP.
  rewrite /good /on_line mmapC derivC horner0 big1 // => i _.
  by rewrite /grad mderivC meval0 mul0r.
have products a b : good a -> good b -> good (a * b).
  rewrite /good => slope_a slope_b; rewrite /on_line rmorphM derivM hornerD !hornerM.
  rewrite -!/(on_line w v _) slope_a slope_b !on_line_at0 mulr_suml mulr_sumr -big_split /=.
  apply: eq_bigr => i _; rewrite /grad mderivM mevalD !mevalM mulrDl mulrA.
  by congr (_ + _); rewrite mulrAC.
have variables i : good 'X_i.
  rewrite /good /on_line mmapX mmap1U derivD derivC add0r derivZ derivX hornerZ hornerC mulr1.
  rewrite (bigD1 i) //= /grad mderivX big1 => [|j /negbTE ji].
    have -> : (U_(i) - U_(i))%MM = 0%MM :> 'X_{1..n} by apply/mnmP => k; rewrite mnmBE mnm0E subnn.
    by rewrite addr0 mnm1E eqxx scale1r mpolyX0 meval1 mul1r.
  by rewrite mderivX mnm1E eq_sym ji scale0r meval0 mul0r.
elim/mpolyind: p => [|c m p' _ _ IH]; first by rewrite -mpolyC0; exact: constants.
apply: (sums) IH; rewrite -mul_mpolyC; apply: (products) => //; rewrite mpolyXE_id.
apply: (big_ind good) => [|q r|i _]; [exact: (constants 1) | exact: products |].
by elim: (m i) => [|k IHk]; [exact: (constants 1) | rewrite exprS; exact: products].
Qed.

End Hessian.
