(** What a computation graph is: a list of steps on a memory. A step is a call of a layer, which
    multiplies by its weights, or any other operation, which knows no weights. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Graph.
Variables (R : comRingType) (N n : nat) (L : finType) (d_out d_in : L -> nat).

(** The memory holds all numbers that the computation has made so far: N rows, and one column for
    each of n samples, tokens or patches. *)
Definition memory := 'M[R]_(N, n).

(** The weights: for each layer l a matrix W l with d_out l rows and d_in l columns. *)
Definition weights := forall l : L, 'M[R]_(d_out l, d_in l).

(** A step. [Call l A B] reads the layer's inputs A *m v from the memory v and adds B *m z of its
    outputs z to it; A and B choose places, for instance. [Other f D E] replaces the memory v by
    f v; D v is the derivative of f at v, which maps changes of v to changes of f v, and E v is its
    transpose, which maps errors back. *)
Inductive step :=
  | Call (l : L) (A : 'M[R]_(d_in l, N)) (B : 'M[R]_(N, d_out l))
  | Other (f : memory -> memory) (D E : memory -> memory -> memory).

(** A graph: the steps in the order of their execution. A layer may be called many times. *)
Definition graph := seq step.

(** What one step makes of the memory. *)
Definition after (W : weights) (v : memory) (s : step) : memory :=
  match s with
  | Call l A B => v + B *m (W l *m (A *m v))
  | Other f D E => f v
  end.

(** The memory at the end. The outputs of the network and its loss are functions of it. *)
Fixpoint run (W : weights) (v : memory) (g : graph) : memory :=
  if g is s :: g' then run W (after W v s) g' else v.

(** The memory at the beginning and after each step: all activations there are. *)
Fixpoint trace (W : weights) (v : memory) (g : graph) : seq memory :=
  v :: if g is s :: g' then trace W (after W v s) g' else [::].

(** Q holds for the inputs of every call: if layer l is called on X, then Q l X. *)
Fixpoint every_input (Q : forall l, 'M[R]_(d_in l, n) -> Prop) W v (g : graph) : Prop :=
  if g is s :: g'
  then (if s is Call l A B then Q l (A *m v) else True) /\ every_input Q W (after W v s) g'
  else True.

(** The weights after a step of size s in the direction dW, all layers at once. *)
Definition moved (W : weights) (s : R) (dW : weights) : weights := fun l => W l + s *: dW l.

(** A change is admissible if it maps the inputs of every call of its layer to 0. *)
Definition admissible (dW W : weights) v (g : graph) : Prop :=
  every_input (fun l X => dW l *m X = 0) W v g.

(** How the memory at the end changes to first order: the chain rule, forwards, if the weights
    change by dW and the memory at the beginning by dv. *)
Fixpoint tangent (W dW : weights) (v dv : memory) (g : graph) : memory :=
  if g is s :: g' then
    tangent W dW (after W v s)
      match s with
      | Call l A B => dv + B *m (dW l *m (A *m v) + W l *m (A *m dv))
      | Other f D E => D v dv
      end g'
  else dv.

(** The gradients G, with M added for layer l. *)
Definition add_at l (M : 'M[R]_(d_out l, d_in l)) (G : weights) : weights := fun k =>
  match l =P k with
  | ReflectT e => ecast k 'M[R]_(d_out k, d_in k) e M + G k
  | ReflectF _ => G k
  end.

(** The backward pass, from the error e at the end: the error at the beginning, and the gradient
    of every layer. A call of a layer with the error delta at its outputs and the inputs X
    contributes delta *m X^T. *)
Fixpoint backward (W : weights) (v : memory) (g : graph) (e : memory) : memory * weights :=
  if g is s :: g' then
    let (e', G) := backward W (after W v s) g' e in
    match s with
    | Call l A B =>
        let delta := B^T *m e' in
        (e' + A^T *m ((W l)^T *m delta), add_at (delta *m (A *m v)^T) G)
    | Other f D E => (E v e', G)
    end
  else (e, fun=> 0).

(** The gradient of layer l, and the error at the beginning. *)
Definition gradient W v g e : weights := (backward W v g e).2.
Definition error W v g e : memory := (backward W v g e).1.

(** In each operation E is the transpose of D. *)
Fixpoint transposed (g : graph) : Prop :=
  if g is s :: g' then
    (if s is Other f D E then forall v e dv, inner (E v e) dv = inner e (D v dv) else True)
    /\ transposed g'
  else True.

(** The inner product of all layers together. *)
Definition pairing (G H : weights) : R := \sum_l inner (G l) (H l).

Lemma add_at_eq l M G : @add_at l M G l = M + G l.
Proof. by rewrite /add_at; case: eqP => // e; rewrite (eq_axiomK e). Qed.

Lemma add_at_neq l k M G : l != k -> @add_at l M G k = G k.
Proof. by rewrite /add_at; case: eqP. Qed.

Lemma pairing_add_at l M (G H : weights) : pairing (@add_at l M G) H = inner M (H l) + pairing G H.
Proof.
rewrite /pairing (bigD1 l) //= [in RHS](bigD1 l) //= add_at_eq innerDl -addrA.
by congr (_ + (_ + _)); apply: eq_bigr => k kl; rewrite add_at_neq // eq_sym.
Qed.

(** If one property of inputs gives another, it does so for all calls. *)
Lemma every_input_impl (P Q : forall l, 'M[R]_(d_in l, n) -> Prop) W v g :
  (forall l X, P l X -> Q l X) -> every_input P W v g -> every_input Q W v g.
Proof.
move=> PQ; elim: g v => //= s g IH v [here later]; split; last exact: IH.
by case: s here {later} => // l A B; exact: PQ.
Qed.

End Graph.

Arguments Call {R N n L d_out d_in} l A B.
Arguments Other {R N n L d_out d_in} f D E.
