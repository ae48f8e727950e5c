(** The projector P on what a layer does not notice. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** P is the orthogonal projector for the inputs R (d rows, n columns): it is symmetric, it is
    idempotent, and it keeps a row x, x P = x, exactly if x R = 0. *)
Definition null_projector (F : fieldType) d n (P : 'M[F]_d) (R : 'M[F]_(d, n)) : Prop :=
  [/\ P^T = P, P *m P = P & forall x : 'rV_d, x *m P = x <-> x *m R = 0].

Section Facts.
Variables (F : fieldType) (d n : nat).
Implicit Types (P : 'M[F]_d) (R : 'M[F]_(d, n)).

(** The same for whole matrices: the fixed points of the projection are the admissible changes.

    verifies: thm-layerwise *)
Theorem fixed_iff_admissible P R m (G : 'M_(m, d)) :
  null_projector P R -> G *m P = G <-> G *m R = 0.
Proof.
case=> _ _ keep; split=> [GP|GR]; apply/row_matrixP => i.
  by rewrite row_mul row0; apply/keep; rewrite -row_mul GP.
by rewrite row_mul; apply/keep; rewrite -row_mul GR row0.
Qed.

(** The projector kills the inputs. *)
Lemma projector_kills P R : null_projector P R -> P *m R = 0.
Proof. by move=> proj; apply/(fixed_iff_admissible _ proj); case: proj. Qed.

Lemma projector_kills_tr P R : null_projector P R -> R^T *m P = 0.
Proof.
move=> proj; have := projector_kills proj; case: proj => sym _ _.
by move/(congr1 trmx); rewrite trmx_mul sym trmx0.
Qed.

(** There is no second one: P is a matter of the inputs, not of how a basis was computed.

    verifies: thm-layerwise *)
Theorem projector_unique P Q R : null_projector P R -> null_projector Q R -> P = Q.
Proof.
move=> projP projQ.
have PQ : P *m Q = P by apply/(fixed_iff_admissible _ projQ); apply: projector_kills.
have QP : Q *m P = Q by apply/(fixed_iff_admissible _ projP); apply: projector_kills.
case: projP projQ => [symP _ _] [symQ _ _].
by rewrite -symP -PQ trmx_mul symP symQ QP.
Qed.

(** Its rank is what the inputs leave free: d minus their rank.

    verifies: thm-layerwise *)
Theorem projector_rank P R : null_projector P R -> \rank P = (d - \rank R)%N.
Proof.
move=> proj; rewrite -mxrank_ker; apply/eqP; rewrite eqn_leq !mxrankS //.
  by apply/submxP; exists (kermx R); symmetry; apply/(fixed_iff_admissible _ proj); exact: mulmx_ker.
by apply/sub_kermxP; exact: projector_kills.
Qed.

Lemma killed_by_span m k (G : 'M_(m, d)) (B : 'M[F]_(d, k)) R :
  (R^T <= B^T)%MS -> G *m B = 0 -> G *m R = 0.
Proof. by case/submxP=> C RC GB; rewrite -[R]trmxK RC trmx_mul trmxK mulmxA GB mul0mx. Qed.

End Facts.

(** The book's P = I - B B^T, where the orthonormal columns of B span the inputs, is such a projector.

    verifies: thm-layerwise *)
Theorem basis_projector (F : fieldType) d n k (R : 'M[F]_(d, n)) (B : 'M[F]_(d, k)) :
  B^T *m B = 1%:M -> (B^T :=: R^T)%MS -> null_projector (1%:M - B *m B^T) R.
Proof.
move=> orthonormal span; have BB : B *m B^T *m B = B by rewrite -mulmxA orthonormal mulmx1.
split; first by rewrite raddfB /= trmx1 trmx_mul trmxK.
  by rewrite mulmxBl mul1mx mulmxBr mulmx1 [B *m B^T *m (B *m B^T)]mulmxA BB subrr subr0.
move=> x; rewrite mulmxBr mulmx1 mulmxA; split=> [kept|zero].
  apply: (@killed_by_span _ _ _ _ _ _ B); first by rewrite span.
  have {}kept : x *m B *m B^T = 0.
    by move/eqP: kept; rewrite -subr_eq0 addrAC subrr sub0r oppr_eq0 => /eqP.
  by rewrite -[B]BB !mulmxA kept mul0mx.
suff -> : x *m B = 0 by rewrite mul0mx subr0.
by apply: (killed_by_span _ zero); rewrite span.
Qed.

Section Existence.
Variables (F : realFieldType) (d n : nat).

(** The product C C^T of independent rows is invertible. *)
Lemma gram_unit k (C : 'M[F]_(k, d)) : row_free C -> C *m C^T \in unitmx.
Proof.
move=> free; rewrite -row_free_unit -kermx_eq0; apply/eqP/row_matrixP => i; rewrite row0.
set y := row i _; have : y *m (C *m C^T) = 0 by rewrite /y -row_mul mulmx_ker row0.
move/(congr1 (fun z => z *m y^T)); rewrite mul0mx => zero.
have : norm2 (y *m C)^T == 0.
  rewrite /norm2 /inner trmxK trmx_mul.
  by move: zero; rewrite !mulmxA => ->; rewrite mxtrace0.
rewrite norm2_eq0 trmx_eq0 => /eqP yC.
by apply/eqP; rewrite -(mulmx_free_eq0 y free) yC.
Qed.

(** There is a projector for all inputs, over any ordered field, the rational numbers included;
    no square root is needed.

    verifies: thm-layerwise *)
Theorem projector_exists (R : 'M[F]_(d, n)) : exists P, null_projector P R.
Proof.
have [C free span] : exists2 C : 'M[F]_(\rank R^T, d), row_free C & (C :=: R^T)%MS.
  by exists (row_base R^T); [exact: row_base_free | exact: eq_row_base].
have := gram_unit free; set K := C *m C^T => unit; set B := C^T *m invmx K.
have symK : K^T = K by rewrite /K trmx_mul trmxK.
have CB : C *m B = 1%:M by rewrite /B mulmxA mulmxV.
exists (1%:M - B *m C); split.
- by rewrite raddfB /= trmx1 /B !trmx_mul trmxK trmx_inv symK mulmxA.
- by rewrite mulmxBl mul1mx mulmxBr mulmx1 -[B *m C *m (B *m C)]mulmxA (mulmxA C) CB mul1mx subrr subr0.
move=> x; rewrite mulmxBr mulmx1 mulmxA; split=> [kept|zero].
  apply: (@killed_by_span _ _ _ _ _ _ C^T); first by rewrite trmxK span.
  have {}kept : x *m B *m C = 0.
    by move/eqP: kept; rewrite -subr_eq0 addrAC subrr sub0r oppr_eq0 => /eqP.
  have : x *m B *m C *m B *m K = 0 by rewrite kept !mul0mx.
  by rewrite -(mulmxA _ C) CB mulmx1 /B -!mulmxA mulVmx // mulmx1.
suff -> : x *m B = 0 by rewrite mul0mx subr0.
rewrite /B mulmxA; suff -> : x *m C^T = 0 by rewrite mul0mx.
by apply: (killed_by_span _ zero); rewrite trmxK span.
Qed.

End Existence.
