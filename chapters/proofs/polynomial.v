(** The objective along a teleport is a polynomial. *)
From mathcomp Require Import all_ssreflect all_algebra all_real_closed.
From Teleport Require Import frobenius graph invariance.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** not covered: thm-polynomial: the gradient by parameters that are no weights of a layer (it is a
    constant matrix times an error, whose degree is bounded here), and finding the step in floating
    point. *)

Section Scalar.
Variable R : comRingType.

(** A function of the step size s is a polynomial of degree at most k. *)
Definition poly_upto (k : nat) (f : R -> R) : Prop :=
  exists2 q : {poly R}, (size q <= k.+1)%N & forall s, f s = q.[s].

Lemma poly_upto_ext k f h : (forall s, f s = h s) -> poly_upto k f -> poly_upto k h.
Proof. by move=> fh [q sq fq]; exists q => // s; rewrite -fh. Qed.

Lemma poly_upto_le k k' f : (k <= k')%N -> poly_upto k f -> poly_upto k' f.
Proof. by move=> le [q sq fq]; exists q => //; apply: leq_trans sq _. Qed.

Lemma poly_upto_const k c : poly_upto k (fun=> c).
Proof.
by exists c%:P => [|s]; rewrite ?hornerC //; apply: leq_trans (size_polyC_leq1 _) _.
Qed.

Lemma poly_upto_line k a c : poly_upto k.+1 (fun s => a + s * c).
Proof.
exists (a%:P + c *: 'X) => [|s]; last by rewrite hornerD hornerC hornerZ hornerX mulrC.
apply: leq_trans (size_add _ _) _; rewrite geq_max; apply/andP; split.
  exact: leq_trans (size_polyC_leq1 _) _.
by apply: leq_trans (size_scale_leq _ _) _; rewrite size_polyX.
Qed.

Lemma poly_upto_add k f h : poly_upto k f -> poly_upto k h -> poly_upto k (fun s => f s + h s).
Proof.
move=> [q sq fq] [r sr hr]; exists (q + r) => [|s]; last by rewrite hornerD fq hr.
by apply: leq_trans (size_add _ _) _; rewrite geq_max sq sr.
Qed.

Lemma poly_upto_sum k (I : Type) (r : seq I) (p : pred I) (f : I -> R -> R) :
  (forall i, p i -> poly_upto k (f i)) -> poly_upto k (fun s => \sum_(i <- r | p i) f i s).
Proof.
move=> each; elim: r => [|i r IH].
  by apply: poly_upto_ext (poly_upto_const k 0) => s; rewrite big_nil.
have [pi|pi] := boolP (p i); last first.
  by apply: poly_upto_ext IH => s; rewrite big_cons (negbTE pi).
by apply: poly_upto_ext (poly_upto_add (each i pi) IH) => s; rewrite big_cons pi.
Qed.

Lemma poly_upto_mul k k' f h :
  poly_upto k f -> poly_upto k' h -> poly_upto (k + k') (fun s => f s * h s).
Proof.
move=> [q sq fq] [r sr hr]; exists (q * r) => [|s]; last by rewrite hornerM fq hr.
apply: leq_trans (size_mul_leq _ _) _.
by rewrite -ltnS -subn1 (leq_ltn_trans (leq_sub2r 1 (leq_add sq sr))) // addSn addnS !subn1.
Qed.

End Scalar.

Section Degree.
Variables (R : comRingType) (N n : nat) (L : finType) (d_out d_in : L -> nat).
Implicit Types (W dW : @weights R L d_out d_in) (v e : memory R N n).
Implicit Type g : @graph R N n L d_out d_in.

(** The largest number of moved layers on a path of the backward pass from the end of the graph to
    place (i, j) of the memory at its beginning. A path goes back through an operation where its
    derivative is not 0, and through a call from the places that it writes to those it reads. *)
Fixpoint depth (moves : pred L) W v g : 'I_N -> 'I_n -> nat :=
  if g is s :: g' then
    let later := depth moves W (after W v s) g' in
    match s with
    | Call l A B => fun i j =>
        maxn (later i j)
          (\max_(c | (row c B != 0) && (col i A != 0)) (moves l + later c j))
    | Other f D E => fun i j =>
        \max_(c : 'I_N * 'I_n | D v (delta_mx i j) c.1 c.2 != 0) later c.1 c.2
    end
  else fun _ _ => 0%N.

(** The largest number of moved layers on a path to the output of a layer: the book's p. *)
Fixpoint longest (moves : pred L) W v g : nat :=
  if g is s :: g' then
    let later := depth moves W (after W v s) g' in
    maxn (longest moves W (after W v s) g')
      (if s is Call l A B then \max_(c : 'I_N * 'I_n | row c.1 B != 0) later c.1 c.2 else 0)
  else 0%N.

(** How many calls there are. *)
Fixpoint calls g : nat :=
  if g is s :: g' then (if s is Call _ _ _ then (calls g').+1 else calls g') else 0%N.

Lemma longest_depth (moves : pred L) W v g i j : (depth moves W v g i j <= calls g)%N.
Proof.
elim: g v i j => //= -[l A B|f D E] g IH v i j; last first.
  by apply/bigmax_leqP => c _; exact: IH.
rewrite geq_max (leq_trans (IH _ _ _) (leqnSn _)) /=.
apply/bigmax_leqP => c _; rewrite -add1n; apply: leq_add (IH _ _ _).
by case: (moves l).
Qed.

(** If a perceptron calls N layers one after the other, then p is at most N - 1: this holds for
    every graph with N calls.

    verifies: thm-polynomial *)
Theorem longest_calls (moves : pred L) W v g : (longest moves W v g <= (calls g).-1)%N.
Proof.
elim: g v => //= -[l A B|f D E] g IH v /=; last by rewrite maxn0 IH.
rewrite geq_max (leq_trans (IH _)) ?leq_pred //=.
by apply/bigmax_leqP => c _; exact: longest_depth.
Qed.

Section Ray.
Variables (dW W : @weights R L d_out d_in) (moves : pred L).
Hypothesis unmoved : forall l, ~~ moves l -> dW l = 0.

(** The backward pass derived from the graph. Along an admissible ray W + s dW, the error at each
    place is a polynomial in s, of degree at most the number of moved layers on a path to it, and
    every entry of the gradient of every layer is one of degree at most p. The operations in
    between may be any: their values do not move along the ray, so neither do their derivatives.

    verifies: thm-polynomial *)
Theorem backward_polynomial v g e : transposed g -> admissible dW W v g ->
  (forall i j, poly_upto (depth moves W v g i j) (fun s => error (moved W s dW) v g e i j)) /\
  (forall l a c, poly_upto (longest moves W v g) (fun s => gradient (moved W s dW) v g e l a c)).
Proof.
elim: g v => [|st g IH] v /=.
  by split=> [i j|l a c]; rewrite /error /gradient /=; exact: poly_upto_const.
move=> [tr trs] [here later].
have same s : after (moved W s dW) v st = after W v st.
  case: st here {tr later} => //= l A B here.
  by rewrite /moved mulmxDl -scalemxAl here scaler0 addr0.
have {IH trs later} [IHe IHg] := IH _ trs later.
case: st tr here same IHe IHg => [l A B|f D E] tr here same IHe IHg.
  pose E' s := error (moved W s dW) (after W v (Call l A B)) g e.
  pose G' s := gradient (moved W s dW) (after W v (Call l A B)) g e.
  have step s : backward (moved W s dW) v (Call l A B :: g) e =
     (E' s + A^T *m ((moved W s dW l)^T *m (B^T *m E' s)),
      add_at (B^T *m E' s *m (A *m v)^T) (G' s)).
    by have /= -> := same s; rewrite /E' /G' /error /gradient /=; case: (backward _ _ g e).
  pose p i j := depth moves W (after W v (Call l A B)) g i j.
  have delta a j : poly_upto (\max_(c | row c B != 0) p c j) (fun s => (B^T *m E' s) a j).
    apply: (@poly_upto_ext _ _ (fun s => \sum_(c | row c B != 0) B c a * E' s c j)) => [s|].
      rewrite mxE [RHS](bigID (fun c => row c B != 0)) /= [X in _ = _ + X]big1 ?addr0.
        by apply: eq_bigr => c _; rewrite mxE.
      move=> c; rewrite negbK => /eqP/rowP/(_ a); rewrite !mxE => ->.
      by rewrite mul0r.
    apply: poly_upto_sum => c Bc; rewrite -[X in poly_upto X]add0n.
    apply: poly_upto_mul; first exact: poly_upto_const.
    by apply: poly_upto_le (IHe c j); exact: (leq_bigmax_cond (F := fun c => p c j)).
  split=> [i j|k a c].
    apply: (@poly_upto_ext _ _ (fun s => E' s i j
        + (A^T *m ((moved W s dW l)^T *m (B^T *m E' s))) i j)) => [s|].
      by rewrite [in RHS]/error step [in RHS]mxE.
    apply: poly_upto_add; first by apply: poly_upto_le (IHe i j); exact: leq_maxl.
    have [zero|nonzero] := eqVneq (col i A) 0.
      apply: poly_upto_ext (poly_upto_const _ 0) => s; rewrite mxE big1 // => b _.
      by rewrite mxE; move/colP/(_ b): zero; rewrite !mxE => ->; rewrite mul0r.
    case: (pickP (fun c => row c B != 0)) => [c0 Bc0|none]; last first.
      have B0 : B = 0 by apply/row_matrixP => c; rewrite row0; apply/eqP/negbFE; exact: none.
      by apply: poly_upto_ext (poly_upto_const _ 0) => s; rewrite {1}B0 trmx0 mul0mx !mulmx0 mxE.
    apply: (@poly_upto_le _ (moves l + \max_(c | row c B != 0) p c j)).
      apply: leq_trans (leq_maxr _ _).
      have [|c1 Bc1 ->] := @eq_bigmax_cond _ (fun c => row c B != 0) (fun c => p c j).
        by apply/card_gt0P; exists c0.
      apply: (@leq_bigmax_cond _ _ (fun c => moves l + p c j)%N).
      by move: Bc1; rewrite unfold_in /= andbT.
    apply: (@poly_upto_ext _ _ (fun s => \sum_b A b i * \sum_a
        ((W l a b + s * dW l a b) * (B^T *m E' s) a j))) => [s|].
      rewrite [in RHS]mxE; apply: eq_bigr => b _; rewrite mxE; congr (_ * _).
      by rewrite [in RHS]mxE; apply: eq_bigr => a _; rewrite /moved !mxE.
    apply: poly_upto_sum => b _; rewrite -[X in poly_upto X]add0n.
    apply: poly_upto_mul; first exact: poly_upto_const.
    apply: poly_upto_sum => a _; apply: poly_upto_mul; last exact: delta.
    have [ml|/unmoved zero] := boolP (moves l); first exact: poly_upto_line.
    by apply: poly_upto_ext (poly_upto_const _ (W l a b)) => s; rewrite zero mxE mulr0 addr0.
  apply: (@poly_upto_ext _ _ (fun s => add_at (B^T *m E' s *m (A *m v)^T) (G' s) k a c)) => [s|].
    by rewrite [in RHS]/gradient step.
  have [lk|lk] := eqVneq l k; last first.
    apply: (@poly_upto_ext _ _ (fun s => G' s k a c)) => [s|]; first by rewrite add_at_neq.
    by apply: poly_upto_le (IHg k a c); exact: leq_maxl.
  rewrite -lk in a c *.
  apply: (@poly_upto_ext _ _ (fun s => \sum_j (B^T *m E' s) a j * (A *m v) c j
      + G' s l a c)) => [s|].
    rewrite add_at_eq [in RHS]mxE [X in _ = X + _]mxE; congr (_ + _); apply: eq_bigr => j _.
    by congr (_ * _); rewrite [in RHS]mxE.
  apply: poly_upto_add; last by apply: poly_upto_le (IHg l a c); exact: leq_maxl.
  apply: poly_upto_sum => j _; rewrite -[X in poly_upto X]addn0.
  apply: poly_upto_mul; last exact: poly_upto_const.
  apply: poly_upto_le (delta a j); apply: leq_trans (leq_maxr _ _).
  apply/bigmax_leqP => b Bb.
  exact: (@leq_bigmax_cond _ (fun c => row c.1 B != 0) (fun c => p c.1 c.2) (b, j)).
pose E' s := error (moved W s dW) (f v) g e.
pose G' s := gradient (moved W s dW) (f v) g e.
have step s : backward (moved W s dW) v (Other f D E :: g) e = (E v (E' s), G' s).
  by rewrite /= /E' /G' /error /gradient; case: (backward _ _ g e).
split=> [i j|l a c]; last first.
  apply: (@poly_upto_ext _ _ (fun s => G' s l a c)) => [s|]; first by rewrite [in RHS]/gradient step.
  by apply: poly_upto_le (IHg l a c); exact: leq_maxl.
pose K := D v (delta_mx i j).
apply: (@poly_upto_ext _ _ (fun s => \sum_(c | K c.1 c.2 != 0) E' s c.1 c.2 * K c.1 c.2)) => [s|].
  rewrite [in RHS]/error step -[RHS]inner_delta tr innerE pair_big /=.
  rewrite [RHS](bigID (fun c => K c.1 c.2 != 0)) /= [X in _ = _ + X]big1 ?addr0 //.
  by move=> c; rewrite negbK => /eqP; rewrite /K => ->; rewrite mulr0.
apply: poly_upto_sum => c Kc; rewrite -[X in poly_upto X]addn0.
apply: poly_upto_mul; last exact: poly_upto_const.
apply: poly_upto_le (IHe _ _).
exact: (@leq_bigmax_cond _ (fun c => K c.1 c.2 != 0)
  (fun c => depth moves W (f v) g c.1 c.2) c).
Qed.

(** So T along the ray, half the sum of the squares of the gradient, is a polynomial of degree at
    most 2 p (here without the factor one half).

    verifies: thm-polynomial *)
Theorem objective_polynomial v g e : transposed g -> admissible dW W v g ->
  let G s := gradient (moved W s dW) v g e in
  poly_upto (longest moves W v g + longest moves W v g) (fun s => pairing (G s) (G s)).
Proof.
move=> tr adm G; have [_ poly] := backward_polynomial e tr adm.
apply: poly_upto_sum => l _.
apply: (@poly_upto_ext _ _ (fun s => \sum_a \sum_c G s l a c * G s l a c)) => [s|].
  by rewrite innerE.
by apply: poly_upto_sum => a _; apply: poly_upto_sum => c _; apply: poly_upto_mul; exact: poly.
Qed.

End Ray.
End Degree.

Section Growth.
Variable F : rcfType.
Implicit Types (T : {poly F}) (M : F).

(** A polynomial that is nowhere negative is constant or grows beyond every bound, in both
    directions of the ray.

    verifies: thm-polynomial *)
Theorem unbounded T : (forall s, 0 <= T.[s]) -> (1 < size T)%N ->
  forall M, exists s0, forall s, s0 <= s -> M < T.[s] /\ M < T.[- s].
Proof.
have one_side (q : {poly F}) : (forall s, 0 <= q.[s]) -> (1 < size q)%N ->
    forall M, exists s0, forall s, s0 <= s -> M < q.[s].
  move=> q0 q1 M; have lead0 : 0 < lead_coef q.
    rewrite lt_neqAle eq_sym lead_coef_eq0 -size_poly_gt0 (leq_trans _ q1) //=.
    rewrite leNgt; apply/negP => neg.
    have pos : 0 < lead_coef (- q) by rewrite lead_coefN oppr_gt0.
    have [s0 far] := poly_pinfty_gt_lc pos.
    have := le_trans (far s0 (lexx _)) (_ : (- q).[s0] <= 0); rewrite hornerN oppr_le0.
    by move/(_ (q0 s0)); rewrite leNgt pos.
  have leadM : lead_coef (q - M%:P) = lead_coef q.
    rewrite lead_coefDl // size_opp; apply: leq_ltn_trans q1; exact: size_polyC_leq1.
  have [|s0 far] := @poly_pinfty_gt_lc _ (q - M%:P); first by rewrite leadM.
  exists s0 => s /far; rewrite leadM hornerD hornerN hornerC => le.
  by rewrite -subr_gt0; exact: lt_le_trans lead0 le.
move=> T0 T1 M; have [s1 right] := one_side T T0 T1 M.
have [||s2 left] := one_side (T \Po (- 'X)) _ _ M.
- by move=> s; rewrite horner_comp hornerN hornerX.
- by rewrite size_comp_poly2 // size_opp size_polyX.
exists (Num.max s1 s2) => s; rewrite le_maxl => /andP[le1 le2]; split; first exact: right.
by have := left s le2; rewrite horner_comp hornerN hornerX.
Qed.

(** With a slope at 0 that is not 0, as along pi(grad T), it is not constant, and it takes every
    value above T(0) at some s > 0.

    verifies: thm-polynomial *)
Theorem every_value T : (forall s, 0 <= T.[s]) -> T^`().[0] != 0 ->
  forall M, T.[0] < M -> exists2 s, 0 < s & T.[s] = M.
Proof.
move=> T0 slope M above.
have T1 : (1 < size T)%N.
  rewrite ltnNge; apply: contra slope => /size1_polyC ->.
  by rewrite derivC horner0.
have [s0 far] := unbounded T0 T1 M; pose s1 := Num.max s0 1.
have s1_gt0 : 0 < s1 by rewrite lt_maxr ltr01 orbT.
have [] := far s1 _; first by rewrite le_maxr lexx.
move=> high _; have [||s] := @poly_ivt _ (T - M%:P) 0 s1; first exact: ltW.
  by rewrite !hornerE subr_le0 subr_ge0 !ltW.
move=> /andP[s_ge0 _] /rootP; rewrite !hornerE => /eqP; rewrite subr_eq0 => /eqP value.
exists s => //; rewrite lt_neqAle s_ge0 andbT eq_sym; apply: contraL above => /eqP zero.
by rewrite -value zero ltxx.
Qed.

End Growth.
