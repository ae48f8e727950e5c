(** The graph computed: the definition of graph.v on lists of numbers, so that a machine can evaluate
    it, and the proof that it is the same. The tests compare it with a definition in Python. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius graph.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Lists.
Variable R : comRingType.

(** A column of numbers, and a matrix as the list of its rows. *)
Definition column := seq R.
Definition rows := seq (seq R).

(** Sum and product of lists, entry by entry; the shorter one is filled up with zeros. *)
Fixpoint add (x y : column) : column :=
  match x, y with
  | [::], _ => y
  | _, [::] => x
  | a :: x', b :: y' => a + b :: add x' y'
  end.
Fixpoint dot (x y : column) : R :=
  match x, y with
  | a :: x', b :: y' => a * b + dot x' y'
  | _, _ => 0
  end.

(** The product of a matrix and a column. *)
Definition apply (A : rows) (x : column) : column := [seq dot row x | row <- A].

(** A step on lists, and the memory after a list of steps. *)
Inductive list_step := ListCall of nat & rows & rows | ListOther of (column -> column).
Definition list_after (W : seq rows) (v : column) (s : list_step) : column :=
  match s with
  | ListCall l A B => add v (apply B (apply (nth [::] W l) (apply A v)))
  | ListOther f => f v
  end.
Fixpoint list_run (W : seq rows) (v : column) (g : seq list_step) : column :=
  if g is s :: g' then list_run W (list_after W v s) g' else v.

(** The numbers of a list as a matrix of m rows and n columns, and as a column. *)
Definition to_mx m n (A : rows) : 'M[R]_(m, n) := \matrix_(i, j) nth 0 (nth [::] A i) j.
Definition to_col n (x : column) : 'cV[R]_n := \col_i nth 0 x i.

(** A list of rows has a shape. *)
Definition shaped m n (A : rows) : Prop := size A = m /\ forall i, (i < m)%N -> size (nth [::] A i) = n.

Lemma nth_add x y i : nth 0 (add x y) i = nth 0 x i + nth 0 y i.
Proof.
elim: x y i => [|a x IH] [|b y] [|i] //=; rewrite ?nth_nil ?add0r ?addr0 //.
Qed.

Lemma dotE n x y : size x = n -> dot x y = \sum_(i < n) nth 0 x i * nth 0 y i.
Proof.
move=> <-; elim: x y => [|a x IH] [|b y] /=; rewrite ?big_ord0 //.
  by rewrite big1 // => i _; rewrite nth_nil mulr0.
by rewrite big_ord_recl IH.
Qed.

Lemma to_col_add n x y : to_col n (add x y) = to_col n x + to_col n y.
Proof. by apply/colP => i; rewrite !mxE nth_add. Qed.

(** The product on lists is the product of matrices. *)
Lemma to_col_apply m n A x : shaped m n A -> to_col m (apply A x) = to_mx m n A *m to_col n x.
Proof.
case=> sA rA; apply/colP => i; rewrite !mxE (nth_map [::]) ?sA //.
by rewrite (@dotE n) ?rA //; apply: eq_bigr => j _; rewrite !mxE.
Qed.

Variables (N : nat) (L : nat) (d_out d_in : 'I_L -> nat).

(** When a list of steps stands for a graph: calls have matrices of the right shapes, and the other
    operations do the same to lists as to columns. *)
Fixpoint stands_for (g : seq list_step) (h : @graph R N 1 _ d_out d_in) : Prop :=
  match g, h with
  | [::], [::] => True
  | ListCall l A B :: g', Call k A' B' :: h' =>
      [/\ l = k :> nat, shaped (d_in k) N A, A' = to_mx _ _ A, shaped N (d_out k) B
        & B' = to_mx _ _ B] /\ stands_for g' h'
  | ListOther f :: g', Other f' D E :: h' =>
      (forall v, to_col N (f v) = f' (to_col N v)) /\ stands_for g' h'
  | _, _ => False
  end.

(** What is computed on lists is what the graph computes. *)
Theorem list_run_is_run (W : seq rows) (W' : weights R d_out d_in) g h v :
  (forall k : 'I_L, shaped (d_out k) (d_in k) (nth [::] W k) /\ W' k = to_mx _ _ (nth [::] W k)) ->
  stands_for g h -> to_col N (list_run W v g) = run W' (to_col N v) h.
Proof.
move=> same; elim: g h v => [|s g IH] [|t h] v //=; first by case: s.
case: s => [l A B|f]; case: t => [k A' B'|f' D E] //.
  case=> -[-> sA -> sB ->] /IH ->; congr (run _ _ _) => /=.
  have [sW ->] := same k.
  by rewrite to_col_add (to_col_apply _ sB) (to_col_apply _ sW) (to_col_apply _ sA).
by case=> here /IH ->; rewrite here.
Qed.

End Lists.

Section Operations.
(** The operations that the tests draw, besides calls: the product of two places is added to a
    third (attention, gates), and the positive part of one place is added to another (ReLU). *)
Definition positive_part (a : rat) : rat := if (0 <= a)%R then a else 0.
Definition add_at_place (k : nat) (a : rat) (v : seq rat) : seq rat :=
  set_nth 0 v k (nth 0 v k + a).
Definition product_step (i j k : nat) : list_step rat_comRing :=
  ListOther (R := rat_comRing) (fun v => add_at_place k (nth 0 v i * nth 0 v j) v).
Definition relu_step (i k : nat) : list_step rat_comRing :=
  ListOther (R := rat_comRing) (fun v => add_at_place k (positive_part (nth 0 v i)) v).

(** A number a / b, and back, so that the tests can write and read it. *)
Definition ratio (a : int) (b : nat) : rat := fracq (a, b%:Z).
Definition ratios (v : seq rat) : seq (int * int) := [seq valq a | a <- v].
End Operations.
