(** Fast weights: a matrix that learns from keys on its way and answers queries. *)
From mathcomp Require Import all_ssreflect all_algebra.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

(** not covered: thm-fast-weights: part 4, that the gradient has its rows in the span, which is
    thm-span for a layer with two uses. *)

Section FastWeights.
Variables (R : comRingType) (d_out d_in : nat).
Implicit Types (W M : 'M[R]_(d_out, d_in)).

(** What a token brings: key, query, rate, and the gradient of its inner loss, which may be any
    function of what the matrix makes of the key. *)
Record token := Token {
  key : 'cV[R]_d_in; query : 'cV[R]_d_in; rate : R; error : 'cV[R]_d_out -> 'cV[R]_d_out }.
Implicit Types (t : token) (ts : seq token) (bs : seq (seq token)).

(** The matrix after the tokens of a batch, W' at its start: all errors are taken at W'. *)
Definition learned (W' W : 'M[R]_(d_out, d_in)) ts : 'M[R]_(d_out, d_in) :=
  foldl (fun V t => V - rate t *: (error t (W' *m key t) *m (key t)^T)) W ts.

(** The answers in a batch: each by the matrix after its own token. *)
Fixpoint answers (W' W : 'M[R]_(d_out, d_in)) ts : seq 'cV[R]_d_out :=
  if ts is t :: rest then
    let V := learned W' W [:: t] in V *m query t :: answers W' V rest
  else [::].

(** The answers in batch after batch. *)
Fixpoint all_answers W bs : seq (seq 'cV[R]_d_out) :=
  if bs is ts :: rest then answers W W ts :: all_answers (learned W W ts) rest else [::].

(** The matrix at the end. *)
Definition last_matrix W bs : 'M[R]_(d_out, d_in) := foldl (fun V ts => learned V V ts) W bs.

(** A move M kills the keys, or the queries, of all tokens. *)
Definition kills (what : token -> 'cV[R]_d_in) M bs : Prop :=
  foldr (fun ts P => foldr (fun t Q => M *m what t = 0 /\ Q) True ts /\ P) True bs.

Lemma learned_moved M W' W ts : foldr (fun t Q => M *m key t = 0 /\ Q) True ts ->
  learned (W' + M) (W + M) ts = learned W' W ts + M.
Proof.
rewrite /learned; elim: ts W => //= t ts IH W [Mt Mts].
by rewrite mulmxDl Mt addr0 addrAC IH.
Qed.

(** With the keys killed the matrix learns the same, and all that it becomes moves along.

    verifies: thm-fast-weights *)
Theorem learns_the_same M W bs : kills key M bs -> last_matrix (W + M) bs = last_matrix W bs + M.
Proof.
rewrite /last_matrix; elim: bs W => //= ts bs IH W [Mts Mbs].
by rewrite learned_moved // IH.
Qed.

Lemma answers_moved M W' W ts : foldr (fun t Q => M *m key t = 0 /\ Q) True ts ->
  answers (W' + M) (W + M) ts = [seq p.1 + M *m query p.2 | p <- zip (answers W' W ts) ts].
Proof.
elim: ts W => //= t ts IH W [Mt Mts].
have /= -> := @learned_moved M W' W [:: t] (conj Mt I).
by rewrite mulmxDl IH.
Qed.

(** And each answer changes by what the move makes of its own query.

    verifies: thm-fast-weights *)
Theorem answers_change M W bs : kills key M bs ->
  all_answers (W + M) bs
    = [seq [seq p.1 + M *m query p.2 | p <- zip b.1 b.2] | b <- zip (all_answers W bs) bs].
Proof.
elim: bs W => //= ts bs IH W [Mts Mbs].
by rewrite answers_moved // learned_moved // IH.
Qed.

(** With the queries killed, too, all answers are as they were, however large the move.

    verifies: thm-fast-weights *)
Theorem answers_kept M W bs : kills key M bs -> kills query M bs ->
  all_answers (W + M) bs = all_answers W bs.
Proof.
move=> keys queries; rewrite answers_change //.
elim: bs W queries {keys} => //= ts bs IH W [Qts Qbs]; rewrite IH //; congr (_ :: _).
move: {2 4}W => W'; elim: ts W' Qts => //= t ts IHt W' [Qt Qts].
by rewrite Qt addr0 IHt.
Qed.

(** All answers depend on the matrix at the start through what it makes of keys and queries alone.

    verifies: thm-fast-weights *)
Theorem products_decide W V bs : kills key (V - W) bs -> kills query (V - W) bs ->
  all_answers V bs = all_answers W bs.
Proof. by move=> keys queries; rewrite -{1}[V](subrK W) addrC answers_kept. Qed.

End FastWeights.
