(** Finite invariance, all layers at once. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Teleport Require Import frobenius graph.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

(** not covered: thm-invariance: rounding, and that the Python records every call of a layer. *)

Section Invariance.
Variables (R : comRingType) (N n : nat) (L : finType) (d_out d_in : L -> nat).
Implicit Types (W dW : @weights R L d_out d_in) (v : memory R N n).
Implicit Type g : @graph R N n L d_out d_in.

(** An admissible change of all layers together, of any size s, leaves every number that the
    computation makes as it was: the same memory after each step. It may read all earlier values
    (residuals, attention), and call a layer many times.

    verifies: thm-invariance *)
Theorem invariance W dW v g s :
  admissible dW W v g -> trace (moved W s dW) v g = trace W v g.
Proof.
elim: g v => //= st g IH v [here later].
suff same : after (moved W s dW) v st = after W v st by rewrite same IH.
case: st here {later} => //= l A B here.
by rewrite /moved mulmxDl -scalemxAl here scaler0 addr0.
Qed.

(** So is the memory at the end, and with it the outputs and every loss.

    verifies: thm-invariance *)
Theorem loss_invariance (T : Type) (loss : memory R N n -> T) W dW v g s :
  admissible dW W v g -> loss (run (moved W s dW) v g) = loss (run W v g).
Proof.
have last_run W' v' : last v' (trace W' v' g) = run W' v' g.
  by elim: g v' => //= st g IH v'; rewrite -(IH (after W' v' st)); case: g {IH}.
by move=> adm; rewrite -!last_run invariance.
Qed.

(** Any statement Q about the inputs of all calls holds after the step if it held before. So what
    was admissible stays admissible, and one basis serves any number of steps.

    verifies: thm-invariance *)
Theorem inputs_stay Q W dW v g s :
  admissible dW W v g -> every_input Q W v g <-> every_input Q (moved W s dW) v g.
Proof.
move=> adm; elim: g v adm => //= st g IH v [here later].
suff -> : after (moved W s dW) v st = after W v st by split=> -[q /(IH _ later)].
case: st here {later} => //= l A B here.
by rewrite /moved mulmxDl -scalemxAl here scaler0 addr0.
Qed.

(** The same for programs of any kind. A program is done, or it calls a layer on inputs X and goes
    on in a way that may depend on the outputs: it may branch and loop on what it has seen. *)
Inductive program (T : Type) :=
  | Done (result : T)
  | Ask (l : L) (X : 'M[R]_(d_in l, n)) (go_on : 'M[R]_(d_out l, n) -> program T).

(** The result of a program. *)
Fixpoint result T W (p : program T) : T :=
  match p with Done r => r | Ask l X go_on => result W (go_on (W l *m X)) end.

(** The change maps the inputs of every call that the program makes to 0. *)
Fixpoint unnoticed T dW W (p : program T) : Prop :=
  match p with
  | Done _ => True
  | Ask l X go_on => dW l *m X = 0 /\ unnoticed dW W (go_on (W l *m X))
  end.

(** The result of any program is as it was, also if the program decides what to do next from what
    it has seen.

    verifies: thm-invariance *)
Theorem program_invariance T W dW (p : program T) s :
  unnoticed dW W p -> result (moved W s dW) p = result W p.
Proof.
elim: p => //= l X go_on IH [here later].
by rewrite /moved mulmxDl -scalemxAl here scaler0 addr0 IH.
Qed.

End Invariance.

Section EveryCall.
(** The network of the counterexample: one layer with one input and one output, called on the
    number 0 and then on the number 1; the outputs are added up in place 2 of the memory. *)
Notation Q := [comRingType of rat].
Definition read_from (i : 'I_3) : 'M[Q]_(1, 3) := delta_mx 0 i.
Definition start : 'M[Q]_(3, 1) := delta_mx 1 0.
Definition twice : graph Q 3 1 (fun _ : unit => 1%N) (fun=> 1%N) :=
  [:: Call tt (read_from 0) (delta_mx 2%:R 0)
    ; Call tt (read_from 1) (delta_mx 2%:R 0)].
Definition weight (w : rat) : weights Q (fun _ : unit => 1%N) (fun=> 1%N) := fun=> w%:M.

(** It needs the inputs of all calls: a change that maps those of the first call of a layer to 0,
    but not those of the second, changes the output, from 1 to 2.

    verifies: thm-invariance *)
Theorem every_call_counts :
  [/\ weight 1 tt *m (read_from 0 *m start) = 0,
      run (weight 1) start twice 2%:R 0 = 1
    & run (moved (weight 1) 1 (weight 1)) start twice 2%:R 0 = 2%:R].
Proof.
have first : read_from 0 *m start = 0 by rewrite /read_from /start mul_delta_mx_0.
have zero W : start + delta_mx 2%:R 0 *m (W *m (read_from 0 *m start)) = start.
  by rewrite first !mulmx0 addr0.
have second : read_from 1 *m start = 1%:M.
  by rewrite /read_from /start mul_delta_mx; apply/matrixP => i j; rewrite !ord1 !mxE.
have one (w : rat) : (start + delta_mx 2%:R 0 *m (w%:M *m (read_from 1 *m start))) 2%:R 0 = w.
  by rewrite second mulmx1 mul_mx_scalar !mxE /= add0r mulr1.
split; first by rewrite first mulmx0.
- by rewrite /= zero one.
- by rewrite /moved /weight /= zero scale1r -raddfD one.
Qed.

End EveryCall.
