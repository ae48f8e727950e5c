(** What survives the projection, fixed points, other geometries. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius projector.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-survivor: losses that are no polynomials: for them the product rule is assumed,
    as a property of the derivative, and that grad T is H g is not proved. *)
(** not covered: thm-fixed: what the inputs of a layer depend on, which is a matter of the graph. *)
(** not covered: thm-geometry: losses that are no polynomials, as for what survives. *)

Section Derivation.
Variables (S F : comRingType).

(** A derivative at one point: numbers that depend on s lie in S, for example polynomials or
    differentiable functions; [at0] is their value at s = 0 and [slope] their derivative there.
    What is asked of the two is the sum rule and the product rule. *)
Record derivative (at0 : {rmorphism S -> F}) (slope : {additive S -> F}) : Prop := Derivative {
  product_rule : forall a b, slope (a * b) = slope a * at0 b + at0 a * slope b
}.

Variables (at0 : {rmorphism S -> F}) (slope : {additive S -> F}).
Hypothesis leibniz : derivative at0 slope.

(** The product rule for matrices. *)
Lemma product_rule_mx m n k (A : 'M[S]_(m, n)) (B : 'M_(n, k)) :
  map_mx slope (A *m B) = map_mx slope A *m map_mx at0 B + map_mx at0 A *m map_mx slope B.
Proof.
apply/matrixP => i j; rewrite !mxE raddf_sum -big_split /=; apply: eq_bigr => l _.
by rewrite !mxE (product_rule leibniz).
Qed.

Lemma product_rule_inner m n (A B : 'M[S]_(m, n)) :
  slope (inner A B) = inner (map_mx slope A) (map_mx at0 B) + inner (map_mx at0 A) (map_mx slope B).
Proof.
rewrite !innerE raddf_sum -big_split /=; apply: eq_bigr => i _.
rewrite raddf_sum -big_split /=; apply: eq_bigr => j _.
by rewrite !mxE (product_rule leibniz).
Qed.

Section Layer.
(** One layer: its errors D and its inputs X as functions of s, n columns each; g = D X^T is its
    gradient. Along w + s v with v = g, the derivative of g is (H g)_l; with v = M^-1 g it is
    (H v)_l. *)
Variables (d_out d_in n : nat) (D : 'M[S]_(d_out, n)) (X : 'M[S]_(d_in, n)) (P : 'M[F]_d_in).
Let D0 := map_mx at0 D.
Let X0 := map_mx at0 X.
Let Ddot := map_mx slope D.
Let Xdot := map_mx slope X.

(** The derivative of the gradient has two terms: in the first the errors move, in the second the
    inputs do.

    verifies: thm-survivor thm-geometry *)
Theorem two_terms : map_mx slope (D *m X^T) = Ddot *m X0^T + D0 *m Xdot^T.
Proof. by rewrite product_rule_mx !map_trmx. Qed.

(** If P is symmetric and kills the inputs, it kills the first term, and of the second it leaves
    D (P Xdot)^T.

    verifies: thm-survivor thm-geometry *)
Theorem survivor : P^T = P -> P *m X0 = 0 ->
  map_mx slope (D *m X^T) *m P = D0 *m (P *m Xdot)^T.
Proof.
move=> sym kills; rewrite two_terms mulmxDl -!mulmxA.
have -> : X0^T *m P = 0 by rewrite -sym -trmx_mul kills trmx0.
by rewrite mulmx0 add0r trmx_mul sym.
Qed.

(** A layer whose inputs do not move, as the first layer of a perceptron, has nothing left: it is a
    fixed point.

    verifies: thm-fixed *)
Theorem fixed_inputs : P^T = P -> P *m X0 = 0 -> Xdot = 0 -> map_mx slope (D *m X^T) *m P = 0.
Proof. by move=> sym kills still; rewrite survivor // still mulmx0 trmx0 mulmx0. Qed.

(** With other data's projector (P does not kill these inputs) both terms stay.

    verifies: thm-keep *)
Theorem both_survive : P^T = P ->
  map_mx slope (D *m X^T) *m P = Ddot *m (P *m X0)^T + D0 *m (P *m Xdot)^T.
Proof. by move=> sym; rewrite two_terms mulmxDl -!mulmxA !trmx_mul sym. Qed.

End Layer.

(** Data do not depend on the weights: their slope is 0.

    verifies: thm-fixed *)
Theorem data_stay d n (C : 'M[F]_(d, n)) (const : {rmorphism F -> S}) :
  (forall c, slope (const c) = 0) -> map_mx slope (map_mx const C) = 0.
Proof. by move=> still; apply/matrixP => i j; rewrite !mxE still. Qed.

End Derivation.

(** A layer whose inputs have full row rank has no null space: its projector is 0.

    verifies: thm-fixed *)
Theorem full_rank_fixed (F : fieldType) d n (P : 'M[F]_d) (R : 'M[F]_(d, n)) :
  null_projector P R -> row_free R -> P = 0.
Proof.
move=> proj free; apply/eqP; rewrite -(mulmx_free_eq0 P free).
by rewrite projector_kills.
Qed.

(** For polynomials in s, value and derivative at s = 0 are such a pair.

    verifies: thm-survivor *)
Theorem polynomial_derivative (F : comRingType) (at0 : {rmorphism {poly F} -> F})
    (slope : {additive {poly F} -> F}) :
  (forall p, at0 p = p.[0]) -> (forall p, slope p = p^`().[0]) -> derivative at0 slope.
Proof.
by move=> value deriv; split=> a b; rewrite !deriv !value derivM hornerD !hornerM.
Qed.

(** The derivative of 1/2 g^T N g along a direction C, with N = M^-1 symmetric and held fixed, is
    the inner product of N g with the derivative of g along C: for v = N g this is (H v) C.

    verifies: thm-geometry *)
Theorem geometry_slope (S F : comRingType) (at0 : {rmorphism S -> F}) (slope : {additive S -> F})
    d (N : 'M[S]_d) (g : 'cV[S]_d) :
  derivative at0 slope -> N^T = N -> map_mx slope N = 0 ->
  slope (inner g (N *m g)) = 2%:R * inner (map_mx at0 (N *m g)) (map_mx slope g).
Proof.
move=> leibniz sym still; have sym0 : (map_mx at0 N)^T = map_mx at0 N by rewrite map_trmx sym.
rewrite (product_rule_inner leibniz) (product_rule_mx leibniz) still mul0mx add0r.
by rewrite inner_mull sym0 map_mxM innerC mulr_natl mulr2n.
Qed.
