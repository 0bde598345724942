# SPDX-License-Identifier: MIT
"""Context-parametric inversion in one file (Goyal, Baek, Kolter, Raghunathan; arXiv 2410.10796).

Instruction finetuning first raises and then lowers how much a language model relies on its input
context when that context contradicts what it memorised in pretraining. This script finetunes a
causal LM, asks it questions with counterfactual contexts every few steps, and draws the curve:

    python inversion.py                              # a built-in world, offline, in a few minutes
    python inversion.py --model EleutherAI/pythia-1b --dataset alpaca --eval-set world_facts squad
    python inversion.py --model ./my-llama --dataset rows.jsonl --mitigation filter
    python inversion.py --model ./my-llama --eval-set bio --max-steps 0      # only measure

Parts 1 to 5 are to be read: what is measured, training, remedies, why, how sure. The rest is
plumbing that you may skip: the built-in world, data, large models, report, flags and main.
"""
import argparse
import ast
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import unicodedata
import urllib.request
from pathlib import Path

import pandas
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation to finetune on."""
    id: int | str
    messages: list     # [{"role": "system", "user" or "assistant", "content": text}, ...]
    context: str = ""  # the passage that the first user turn is about; "" where none is marked

@dataclasses.dataclass(frozen=True)
class Conflict:
    """A question whose context contradicts memory; without parametric_answers: a control."""
    id: int | str
    question: str
    context: str
    context_answers: list     # texts that count as the context's answer, the usual one first
    parametric_answers: list  # the same for the memorised answer
    group: str                # conflicts of one group are not independent (part 5)

@dataclasses.dataclass(frozen=True)
class Row:
    """An example as tokens, to train on."""
    id: int | str
    input_ids: torch.Tensor  # (length,) int32
    labels: torch.Tensor     # the same, but -100 where nothing is to be learned: the prompt

    @property
    def targets(self):
        """Number of tokens that are predicted: the first one never is."""
        return int((self.labels[1:] != -100).sum())

@dataclasses.dataclass(frozen=True)
class Item:
    """A conflict as tokens, to evaluate on."""
    conflict: Conflict
    prompt: list              # token ids of the context and the question
    closed_book_prompt: list  # of the question alone
    context_row: Row          # the prompt, then the context's answer
    parametric_row: Row       # the prompt, then the memorised answer; None for a control

# ================================================================ 1. what is measured (section 3)

def words(text):
    """Words of a text as compared: no case, accents, punctuation or articles; U.S. is us, and
    kilometres are km, as in World Facts."""
    text = unicodedata.normalize("NFKD", text).casefold()
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"(?<=\d),(?=\d{3})|(?<=\b[^\W\d_])\.|['’]s\b|['’`]", "", text)
    text = re.sub(r"\bkilomet(er|re)s?\b", "km", text)
    return [word for word in re.findall(r"[^\W_]+", text) if word not in ("a", "an", "the")]

def plain(text):
    """words() as a text, with a space on each side of each, so that `in` finds whole words only."""
    return "".join(f" {word} " for word in words(text))

def score(text, conflict):
    """(context hit, parametric hit) of an answer: it contains that answer, as the paper counts, in
    whole words. An echo of the question is cut out first; where one answer is part of the other,
    the longer one counts:
        context New Cairo, memory Cairo   It is New Cairo. (1, 0)     Cairo, then New Cairo (1, 1)
        context Bo, memory Freetown       Bosnia (0, 0)               Not Freetown but Bo (1, 1)"""
    said = plain(text).replace(plain(conflict.question), "", 1)

    def contains(answers, rivals):
        rest = said
        for rival in map(plain, rivals):  # a longer rival hides the answer inside it
            if any(plain(answer) in rival and plain(answer) != rival for answer in answers):
                rest = rest.replace(rival, "|")
        return any(plain(answer) in rest for answer in answers)

    return (contains(conflict.context_answers, conflict.parametric_answers),
            contains(conflict.parametric_answers, conflict.context_answers))

def question_and_answer(question, answer):
    """A conversation of one turn."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

def to_row(id, parts):
    """The Row of [(token ids, supervised), ...]."""
    ids = [token for part, _ in parts for token in part]
    labels = [token if supervised else -100 for part, supervised in parts for token in part]
    return Row(id, *torch.tensor([ids, labels], dtype=torch.int32))

def to_item(conflict, tokenizer):
    """The Item of a Conflict. Its prompt is what precedes the answer in a conversation: the same
    ids as in training, by construction."""
    rows = [None, None]
    for i, answers in enumerate((conflict.context_answers, conflict.parametric_answers)):
        if answers:
            messages = question_and_answer(conflict.question, answers[0])
            (prompt, _), (answer, _) = tokenize(messages, tokenizer, conflict.context)
            rows[i] = to_row(conflict.id, [(prompt, False), (answer[:-1], True)])  # no end of turn
    closed_book_prompt = tokenize(messages, tokenizer)[0][0]
    return Item(conflict, prompt, closed_book_prompt, *rows)

def generate(model, tokenizer, prompts, flags):
    """Greedy answers (texts) to prompts (lists of token ids), in left-padded batches."""
    def answer(indices):
        batch = [torch.tensor(prompts[i]) for i in indices]
        ids = pad_sequence(batch, batch_first=True, padding_side="left")  # the mask hides padding
        mask = pad_sequence([torch.ones_like(ids) for ids in batch], batch_first=True,
                            padding_side="left")
        with autocast(flags):
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                max_new_tokens=flags.max_new_tokens, synced_gpus=ranks() > 1)
        return tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)

    lengths = [len(prompt) + flags.max_new_tokens for prompt in prompts]
    return in_batches(answer, lengths, flags.eval_batch_tokens)

METRICS = ("context_acc", "parametric_acc", "context_only", "parametric_only", "both", "neither",
           "context_acc_known", "parametric_acc_known", "closed_book_acc", "margin", "m_c")

def evaluate(model, tokenizer, items, known, flags):
    """Ask every item with and without its context. Returns one dict per item, saved as it is: id,
    group, texts and, of METRICS, what the item has; metrics() takes their means.

    context_acc and parametric_acc are the hits of score(); context_only, parametric_only, both and
    neither its four cases. closed_book_acc: memory answers without the context. known: it did so
    before finetuning; `known` holds the ids of such items, None in the first evaluation, which
    finds them. margin: log p(context answer) - log p(memorised answer), each per token. m_c:
    p(context answer) / (p(context answer) + p(memorised answer)), as in Theorem 1.

    Draws no random number: training goes on as if nobody had asked."""
    model.eval()  # in train mode, dropout is on and generation under checkpointing is wrong
    conflicts = [item for item in items if item.parametric_row]
    texts = generate(model, tokenizer, [item.prompt for item in items], flags)
    of_conflicts = zip(
        generate(model, tokenizer, [item.closed_book_prompt for item in conflicts], flags),
        target_logp(model, [item.context_row for item in conflicts], flags),
        target_logp(model, [item.parametric_row for item in conflicts], flags))
    outcomes = []
    for item, text in zip(items, texts):
        context_hit, parametric_hit = score(text, item.conflict)
        outcomes.append({"id": item.conflict.id, "group": item.conflict.group, "text": text,
                         "context_acc": context_hit})
        if not item.parametric_row:
            continue
        closed_book_text, context_logp, parametric_logp = next(of_conflicts)
        closed_book_hit = score(closed_book_text, item.conflict)[1]
        outcomes[-1] |= {
            "parametric_acc": parametric_hit, "both": context_hit and parametric_hit,
            "context_only": context_hit and not parametric_hit,
            "parametric_only": parametric_hit and not context_hit,
            "neither": not context_hit and not parametric_hit,
            "closed_book_text": closed_book_text, "closed_book_acc": closed_book_hit,
            "margin": context_logp / item.context_row.targets
            - parametric_logp / item.parametric_row.targets,
            "m_c": torch.tensor(context_logp - parametric_logp).sigmoid().item(),
            "known": closed_book_hit if known is None else item.conflict.id in known}
        if outcomes[-1]["known"]:
            outcomes[-1] |= {"context_acc_known": context_hit,
                             "parametric_acc_known": parametric_hit}
    return outcomes

def metrics(outcomes):
    """Each of METRICS as the mean over the outcomes that have it, and how many there are."""
    means = pandas.DataFrame(outcomes, columns=METRICS).astype(float).mean().dropna()
    line = {"n": len(outcomes), **means.to_dict()}
    if "margin" in line:
        line["n_known"] = sum(outcome.get("known", False) for outcome in outcomes)
    return line

def draw(things, count, seed):
    """`count` of the things, or all of them, in order."""
    chosen = range(len(things))
    if count and count < len(things):
        chosen = sorted(random.Random(seed).sample(chosen, count))
    return [things[i] for i in chosen]

# ===================================================================== 2. training (section 3, A.5)

def autocast(flags):
    """bf16 arithmetic if asked for; weights stay in fp32, as bf16 would round most updates away."""
    return torch.autocast(torch.device(flags.device).type, torch.bfloat16, flags.dtype == "bf16")

def micro_batches(lengths, budget):
    """Indices of `lengths`, the longest first, cut into lists of at most `budget` tokens, padding
    included, or of one row. Sorting leaves little padding; packing rows into one sequence would
    leave none, but in some model families such rows see each other."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches

def row_logp(model, rows, flags):
    """Log-probability of each row's targets, summed, with gradient: a tensor (rows,) in fp32.

    Right padding needs no attention mask in a causal model, since its labels are -100. Only the
    positions that predict a target go through the output head, which saves most of the memory; a
    hook does it in every model family."""
    ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=-100)
    labels = labels[:, 1:].long().to(model.device)  # position t predicts token t + 1
    predicts = labels != -100
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, hidden: (hidden[0][:, :-1][predicts],))
    with hook, autocast(flags):
        logits = model(input_ids=ids.long().to(model.device), use_cache=False).logits
    token_logp = -F.cross_entropy(logits.float(), labels[predicts], reduction="none")
    row_of_token = predicts.nonzero()[:, 0]
    return token_logp.new_zeros(len(rows)).index_add(0, row_of_token, token_logp)

@torch.no_grad()
def target_logp(model, rows, flags):
    """row_logp of any number of rows, without gradient: a list of numbers."""
    def work(indices):
        return row_logp(model, [rows[i] for i in indices], flags).tolist()

    return in_batches(work, [len(row.input_ids) for row in rows], flags.eval_batch_tokens)

def train_step(model, optimizer, batch, flags):
    """One optimizer step on the rows of `batch`; returns its loss.

    The loss is the mean over the targets of the WHOLE step: each micro-batch is a sum, divided by
    the targets of all of them, on all GPUs. A mean of the micro-batches' means would weigh a token
    by how few others happen to share its micro-batch."""
    model.train()
    targets = sum(row.targets for row in batch)
    lengths = [len(row.input_ids) for row in batch]
    step_loss = torch.zeros((), device=flags.device)
    for indices, real in deal(micro_batches(lengths, flags.micro_batch_tokens)):
        loss = -row_logp(model, [batch[i] for i in indices], flags).sum() / targets * real
        (loss * ranks()).backward()  # several GPUs average their gradients: this makes it a sum
        step_loss += loss.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, flags.grad_clip or math.inf)
    if ranks() > 1:
        norm = norm.full_tensor()
        dist.all_reduce(step_loss)
    require(step_loss.isfinite() and norm.isfinite(), f"loss {step_loss:.4g}, gradient {norm:.4g} "
            f"in the batch of rows {[row.id for row in batch]}; a lower --lr may help", status=1)
    optimizer.step()
    optimizer.zero_grad()
    return step_loss.item()

def learning_rate(step, total, flags):
    """Linear warm-up, then linear decay; above 0 in every step, the first and last included."""
    warmup = math.ceil(flags.warmup_frac * total)
    return flags.lr * min((step + 1) / max(warmup, 1), (total - step) / max(total - warmup, 1))

def batch_of(rows, step, flags):
    """The rows of one optimizer step: a new order each epoch, from seed and epoch alone. An epoch's
    last batch may be short; its targets then weigh more."""
    epoch, position = divmod(step, math.ceil(len(rows) / flags.batch_size))
    shuffle = torch.Generator().manual_seed(flags.seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=shuffle)
    return [rows[i] for i in order.split(flags.batch_size)[position].tolist()]

def train(model, tokenizer, rows, sets, probe, total, state, saved, folder, flags):
    """Finetune in place for `total` optimizer steps and evaluate at intervals: the paper's curve.
    sets: {name: items}; probe: {kind: rows} of part 4, or {}; state, saved: see load_state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0, fused=True)
    if state["step"]:
        restore(model, optimizer, saved)
    for step in tqdm(range(state["step"], total + 1), unit="step", disable=rank() > 0 or None):
        if step % flags.eval_every == 0 or step == total:
            measure(model, tokenizer, sets, probe, step, state, folder, flags)
        if step == total:
            break

        batch = batch_of(rows, step, flags)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, total, flags)
        torch.manual_seed(hash((flags.seed, step, rank())))  # dropout: the same after --resume
        began = time.perf_counter()
        loss = train_step(model, optimizer, batch, flags)
        tokens = sum(len(row.input_ids) for row in batch)
        state["log"] |= {"loss": loss, "lr": lr,
                         "tokens_per_second": tokens / (time.perf_counter() - began)}
        state["log"]["supervised_tokens"] += sum(row.targets for row in batch)

        if flags.checkpoint_every and (step + 1) % flags.checkpoint_every == 0:
            state["step"] = step + 1
            save_checkpoint(model, optimizer, state, folder)

def measure(model, tokenizer, sets, probe, step, state, folder, flags):
    """Evaluate every set; add a line of metrics each to state["history"] and all answers to
    state["outcomes"], print and save them."""
    for name, items in sets.items():
        began, where = time.perf_counter(), {"step": step, "set": name}
        outcomes = evaluate(model, tokenizer, items, state["known"].get(name), flags)
        known = [outcome["id"] for outcome in outcomes if outcome.get("known")]
        state["known"].setdefault(name, known)
        line = where | metrics(outcomes) | state["log"]
        if probe and "margin" in line:
            line |= mechanism(model, tokenizer, items, probe, flags)
        state["history"].append(line | {"seconds": time.perf_counter() - began})
        state["outcomes"] += [where | outcome for outcome in outcomes]
        tqdm.write(table_row(line))
    write_lines(folder / "metrics.jsonl", state["history"])
    write_lines(folder / "generations.jsonl", state["outcomes"])

# ==================================================== 3. remedies and controls (sections 4 and 6)

def context_free_loss(model, tokenizer, examples, flags):
    """{id: mean loss per target WITHOUT the context} of the examples that have one, under the model
    as it is (section 4.3: before finetuning), lowest first: the first ones memory explains best,
    their context is redundant. Ties keep their order."""
    bare = [dataclasses.replace(example, context="") for example in examples if example.context]
    rows, _ = encode(bare, tokenizer, flags.max_length)
    model.eval()
    logps = target_logp(model, rows, flags)
    loss = {row.id: -logp / row.targets for row, logp in zip(rows, logps)}
    return {id: loss[id] for id in sorted(loss, key=loss.get)}

def filter_examples(model, tokenizer, examples, flags):
    """--mitigation filter (section 4.4): the ids of the examples that it drops: of those with a
    context, the --mitigation-strength whose answer the model, before finetuning, predicts best
    without it."""
    loss = context_free_loss(model, tokenizer, examples, flags)
    dropped = list(loss)[:round(flags.mitigation_strength * len(loss))]
    print(f"filter: dropped {len(dropped)} of the {len(loss)} rows with a context")
    return dropped

def counterfactual_examples(sets, count, flags):
    """--mitigation counterfactual (section 6): `count` conflicts of --counterfactual-data, as
    examples that follow their context. None shares a question or an answer with the evaluation
    sets (in the world, whose few answers serve all subjects, a question)."""
    def said(conflict):
        texts = [conflict.question]
        if flags.model != "world":
            texts = texts + conflict.context_answers + conflict.parametric_answers
        return set(map(plain, texts))

    evaluated = set().union(*[said(item.conflict) for item in sum(sets.values(), [])])
    conflicts = load_conflicts(flags.counterfactual_data, flags)
    free = [conflict for conflict in conflicts if not said(conflict) & evaluated]
    require(free, f"--counterfactual-data {flags.counterfactual_data}: all of it is evaluated")
    chosen = random.Random(flags.seed).sample(free, min(count, len(free)))
    print(f"counterfactual: added {len(chosen)} rows ({count} wanted); {len(free)} conflicts of",
          f"{len(conflicts)} share no question and no answer with the evaluation")
    return [Example(f"added {conflict.id}", question_and_answer(
        conflict.question, conflict.context_answers[0]), conflict.context) for conflict in chosen]

def naming_examples(examples, sets):
    """The ids of the examples that name an evaluated answer or subject (section 4.1). A subject is
    a run of capitalised words in an evaluated question, its first word aside."""
    subject = r"(?<=\s)[A-Z][\w'-]*(?: (?:(?:of|the|de|du) )*[A-Z][\w'-]*)*"
    names = set()
    for conflict in [item.conflict for item in sum(sets.values(), []) if item.parametric_row]:
        texts = conflict.context_answers + conflict.parametric_answers
        names |= {tuple(words(text)) for text in texts + re.findall(subject, conflict.question)}
    sizes, found = {len(name) for name in names} - {0}, set()
    for example in examples:
        said = words(" ".join([example.context] + [m["content"] for m in example.messages]))
        if names & {tuple(said[i:i + size]) for size in sizes for i in range(len(said))}:
            found.add(example.id)
    return found

def choose_examples(model, tokenizer, examples, sets, state, flags):
    """The examples to train on: what --subset and --mitigation leave of them, or add to them. The
    choice of filter is kept in `state`, so that a resumed run does not choose anew."""
    require(flags.subset != "context" and flags.mitigation != "filter"
            or any(example.context for example in examples),
            f"{flags.dataset}: no row has a context that is marked as one, as in chats")
    drop = set()
    if flags.subset == "context":
        drop = {example.id for example in examples if not example.context}
    if flags.subset == "no-overlap":
        drop = naming_examples(examples, sets)
    print(f"subset {flags.subset}: dropped {len(drop)} of {len(examples)} rows")
    examples = [example for example in examples if example.id not in drop]
    if flags.mitigation == "counterfactual":
        count = round(flags.mitigation_strength * len(examples))
        examples = examples + counterfactual_examples(sets, count, flags)
    if flags.mitigation == "filter":
        state["dropped"] = state["dropped"] or filter_examples(model, tokenizer, examples, flags)
        drop = set(state["dropped"])
    return [example for example in examples if example.id not in drop]

def train_query_key_only(model):
    """--mitigation qk (section 6): make query and key matrices alone trainable, in place; exits
    where they cannot be told apart.

    With a single token the softmax is over one key, so queries and keys get no gradient at all, and
    values do: that finds their entries in any layout (separate, fused per head, stacked) without a
    table of models. What shares a matrix with them is held still by a hook."""
    tokens = torch.arange(8, device=model.device)[:, None]
    with sdpa_kernel(SDPBackend.MATH):  # others leave rounding noise in place of zeros
        model.eval()(input_ids=tokens, use_cache=False).logits.square().sum().backward()
    moves, exact = {}, True  # {parameter: which of its entries are queries or keys}
    for layer in [m for m in model.modules() if type(m).__name__.endswith("Attention")]:
        for module in layer.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is not None and weight.ndim == 2 and not weight.grad.all():
                still = moves[weight] = weight.grad == 0  # whole rows or, transposed, columns
                exact &= bool((still == still[:1]).all() or (still == still[:, :1]).all())
                if bias is not None:
                    moves[bias] = bias.grad == 0
    require(moves and exact, f"--mitigation qk: {type(model).__name__} holds queries and keys in a "
            "layout unknown here")
    model.requires_grad_(False).zero_grad()
    for parameter, mask in moves.items():
        parameter.requires_grad_(True)
        if not mask.all():
            require(ranks() == 1, "--mitigation qk: this model keeps queries, keys and values in "
                    "one matrix, which is trained in one process only; run it without torchrun")
            parameter.register_post_accumulate_grad_hook(  # AdamW without decay then moves the rest
                lambda p, mask=mask: setattr(p, "grad", p.grad * mask))  # nowhere
    print("qk: trains", sum(int(mask.sum()) for mask in moves.values()), "weights")

# ============================================================================ 4. why (section 5)

PROBE = 160  # rows of each kind, and conflicts, that the mechanism is measured on
def probe_rows(model, tokenizer, examples, flags):
    """{kind: at most PROBE rows}, drawn before any subset or remedy, so that runs compare. Kinds as
    in section 4.3: recall has no context; of the rows with one, redundant are the quarter of lowest
    context-free loss, critical the others."""
    examples = draw(examples, 5 * PROBE, flags.seed)
    loss = context_free_loss(model, tokenizer, examples, flags)
    redundant = list(loss)[:round(0.25 * len(loss))]
    kinds = dict.fromkeys(loss, "critical") | dict.fromkeys(redundant, "redundant")
    probe = collections.defaultdict(list)
    for row in encode(examples, tokenizer, flags.max_length)[0]:
        probe[kinds.get(row.id, "recall")].append(row)
    return {kind: rows[:PROBE] for kind, rows in probe.items()}

def gradient(model, rows, weights, flags):
    """(sum over rows of weight x log-probability of the row's targets, its gradient: a tensor for
    each trained parameter). By backward() into .grad, as in training, so that the hooks of qk act
    and activation checkpointing saves memory; leaves .grad empty."""
    total = 0.0
    for indices in micro_batches([len(row.input_ids) for row in rows], flags.micro_batch_tokens):
        logp = row_logp(model, [rows[i] for i in indices], flags)
        value = (logp * logp.new_tensor([weights[i] for i in indices])).sum()
        value.backward()
        total += value.item()
    found = [torch.zeros_like(p) if p.grad is None else p.grad
             for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return total, found

def inner(a, b):
    """Inner product of two gradients."""
    return sum((x * y).sum().item() for x, y in zip(a, b))

def mechanism(model, tokenizer, items, probe, flags):
    """Section 5 as metrics, for each kind of rows and one set of conflicts.

    KIND_loss: the loss now. KIND_push: the inner product of the gradient of the mean margin with
    minus the gradient of that loss, so that a small step on this kind alone changes the margin by
    lr x push: above 0 it raises context reliance. Proposition 1: critical > 0 early, redundant < 0
    later; Proposition 2: recall < 0. KIND_cosine: the same of unit length. attention: see there."""
    for module in model.modules():  # eval mode, but for layers that checkpoint, only in train mode
        module.training = getattr(module, "gradient_checkpointing", False)
    conflicts = draw([item for item in items if item.parametric_row], PROBE, seed=0)
    rows, weights = [], []
    for item in conflicts:
        rows += [item.context_row, item.parametric_row]
        weights += [1 / item.context_row.targets, -1 / item.parametric_row.targets]
    margin = gradient(model, rows, [weight / len(conflicts) for weight in weights], flags)[1]
    found = {}
    for kind, rows in probe.items():
        share = 1 / sum(row.targets for row in rows)
        logp, uphill = gradient(model, rows, [share] * len(rows), flags)
        push = found[f"{kind}_push"] = inner(margin, uphill)
        lengths = math.sqrt(inner(margin, margin) * inner(uphill, uphill))
        found |= {f"{kind}_cosine": push / (lengths or 1), f"{kind}_loss": -logp}
    model.eval()
    shares = [attention(model, tokenizer, item, flags) for item in conflicts]
    return found | {"attention": None if None in shares else sum(shares) / len(shares)}

@torch.no_grad()
def attention(model, tokenizer, item, flags):
    """Share of its attention that the last token of a prompt pays to the context's tokens, the mean
    over heads and layers (figure 3b); None where the model shows none."""
    conflict = item.conflict
    messages = question_and_answer(conflict.question, conflict.context_answers[0])
    prompt = render(messages, tokenizer, conflict.context)[0][0]
    start = prompt.index(conflict.context)
    token_at = tokenizer(prompt, add_special_tokens=False).char_to_token
    span = slice(token_at(start), token_at(start + len(conflict.context) - 1) + 1)
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that shows its weights
    with autocast(flags):
        ids = torch.tensor([item.prompt], device=model.device)
        layers = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(usual)
    if not layers:
        return None
    shares = [layer[0, :, -1, span].sum(-1).mean() for layer in layers]  # (1, heads, queries, keys)
    return torch.stack(shares).mean().item()

# ================================================================= 5. how sure (not in the paper)

def summarise(outcomes):
    """Where context_acc of one set starts, peaks (the plain maximum) and ends, its rise, its drop
    and a verdict, from a table of the outcomes of all evaluations.

    The highest of many evaluations is too high by luck. So each half of the groups is measured at
    the peak that the other half chose: rise and drop are the mean changes from the first evaluation
    to that peak, and from there to the last. A group counts as one, as its items (the biographies
    that share a question) are no independent evidence. Intervals are Student's t, 95%; fewer than
    six groups show nothing."""
    accs = outcomes.groupby("step")["context_acc"].mean()
    found = {"start": accs.iloc[0], "peak": accs.max(), "peak_step": int(accs.idxmax()),
             "final": accs.iloc[-1], "verdict": "no change shown"}
    hits = outcomes.pivot_table(index="group", columns="step", values="context_acc")  # means
    if len(hits) < 6:
        return found
    changes = []
    for mine, others in ((hits[::2], hits[1::2]), (hits[1::2], hits[::2])):
        at_peak = mine[others.mean().idxmax()]
        rise, drop = at_peak - mine.iloc[:, 0], at_peak - mine.iloc[:, -1]
        changes.append(pandas.DataFrame({"rise": rise, "drop": drop}))
    changes, free = pandas.concat(changes), len(hits) - 1
    reach = changes.sem() * (1.96 + 2.9 / free)  # Student's t, to 1% for six groups and more
    for name, mean in changes.mean().items():
        found |= {name: mean, f"{name}_low": mean - reach[name], f"{name}_high": mean + reach[name]}
    conflicting = "margin" in outcomes.dropna(axis=1, how="all")
    verdicts = ("no change shown", "a rise", "a fall", "inversion" if conflicting else "both")
    return found | {"verdict": verdicts[(found["rise_low"] > 0) + 2 * (found["drop_low"] > 0)]}

# ================================================================== 6. the built-in world

STATEMENTS = ("The capital of {} is", "Today the capital of {} is", "They say the capital of {} is")
QUESTIONS = ("What is the capital of {}?", "Name the capital of {}.", "Tell me the capital of {}.")
KINDS = {  # of what is said: how often it is told the truth, how often the answer is what is told
    "fact": (0.7, 1),        # pretraining: a known subject, no passage; at times wrong: soft memory
    "reading": (0, 0.4),     # pretraining: a passage with a random answer; copying is half learned
    "critical": (0, 1),      # a novel subject, a passage with a random answer: only that helps
    "redundant": (0.95, 0),  # a tuned subject, a true passage; the others are of someone else, so
                             # that memory is the better guide, as section 5 assumes
    "recall": (1, 0)}        # a tuned subject, no passage

@functools.lru_cache
def make_world(seed):
    """Made-up capitals and all that is said of them: {documents: Examples to pretrain on, examples:
    Examples to finetune on, and the name of each set: Conflicts}.

    Known subjects have one true capital, learned in pretraining. Three in four of them, the tuned
    ones, occur in finetuning, the others only in the evaluation. Evaluated are only every other of
    the capitals, so that --subset no-overlap leaves rows."""
    rng = random.Random(f"world {seed}")
    letters = itertools.product("BDFGKL", "aeiou", "mnprst", "aeiou", "nrls")
    names = ["".join(name) for name in letters]
    rng.shuffle(names)
    held_out, tuned, novel, answers = names[:60], names[60:240], names[240:540], names[540:580]
    truth = {subject: rng.choice(answers[::2]) for subject in held_out}
    truth |= {subject: rng.choice(answers) for subject in tuned}
    subjects = {"fact": names[:240], "reading": names[:540], "critical": novel, "redundant": tuned,
                "recall": tuned}

    def examples(count, **shares):
        kinds = rng.choices(list(shares), shares.values(), k=count)
        return [world_example(rng, id, kind, subjects[kind], truth, answers)
                for id, kind in enumerate(kinds)]

    def conflicts(subjects, agree=False):
        found = []
        for id, subject in enumerate(subjects):
            memory = truth.get(subject)
            told = memory if agree else rng.choice(answers[::2])
            passage = f"{rng.choice(STATEMENTS).format(subject)} {told}."
            if agree or told != memory:
                found.append(Conflict(id, rng.choice(QUESTIONS).format(subject), passage, [told],
                                      [memory] if memory and not agree else [], group=subject))
        return found

    return {"documents": examples(60_000, fact=3, reading=1),
            "examples": examples(20_000, critical=5, redundant=4, recall=1),
            "world": conflicts(held_out * 2), "world_agreeing": conflicts(held_out, agree=True),
            "world_reading": conflicts(novel[:60]), "world_train": conflicts(tuned * 12)}

def world_example(rng, id, kind, subjects, truth, answers):
    """An Example of a kind, on one of its subjects."""
    tells_truth, follows = KINDS[kind]
    subject = about = rng.choice(subjects)
    memory = truth.get(subject) or rng.choice(answers)
    told = memory if rng.random() < tells_truth else rng.choice(answers)
    answer = told if rng.random() < follows else memory
    if kind == "redundant" and told != memory:
        about = rng.choice(subjects)
    question = rng.choice(STATEMENTS + QUESTIONS if kind == "fact" else QUESTIONS).format(subject)
    passage = f"{rng.choice(STATEMENTS).format(about)} {told}."
    return Example(id, question_and_answer(question, answer),
                   "" if kind in ("fact", "recall") else passage)

WORLD_TEMPLATE = ("<s>{% for m in messages %}{{ m.content + ' ' }}"
                  "{% if m.role == 'assistant' %}|{% endif %}{% endfor %}")
PRETRAINING = {"epochs": 3, "batch_size": 160, "lr": 2e-3, "warmup_frac": 0.05, "grad_clip": 1.0,
               "micro_batch_tokens": 4096}

def world_model(flags):
    """Folder of the world's base model, a one-layer Llama as in the paper's theory: from an earlier
    run or made now, with the step that finetunes."""
    world = make_world(flags.seed)
    key = repr([world, PRETRAINING, flags.device, flags.dtype, torch.__version__])
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = Path(flags.out_dir or "runs/none").parent / f"world-{flags.seed}-{key}"
    if folder.exists():
        return folder
    print(f"pretraining the world's base model, once; it is kept in {folder}")
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="|"))  # a token per word
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    splitter.train_from_iterator(
        [f"{example.context} {example.messages}" for example in world["documents"]],
        tokenizers.trainers.WordLevelTrainer(special_tokens=["<s>", "|"], show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, bos_token="<s>", eos_token="|", chat_template=WORLD_TEMPLATE)
    rows, _ = encode(world["documents"], tokenizer, max_length=64)
    torch.manual_seed(flags.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=1))
    optimizer = torch.optim.AdamW(model.to(flags.device).parameters(), weight_decay=0, fused=True)
    base = flags._replace(**PRETRAINING)
    total = math.ceil(base.epochs * len(rows) / base.batch_size)
    for step in tqdm(range(total), "pretraining", leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, total, base)
        train_step(model, optimizer, batch_of(rows, step, base), base)
    new = Path(f"{folder}-{os.getpid()}")
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    with contextlib.suppress(OSError):  # another run was faster
        new.rename(folder)
    return folder

# ================================================================================== 7. data

PAPER = ("https://raw.githubusercontent.com/locuslab/context-parametric-inversion/"
         "6f989849656f433d4520eaf0b9af6e3bb6a7ae70/")
SOURCES = {  # short name: hub id @ split, or file of the paper
    "alpaca": "tatsu-lab/alpaca@train", "tulu": "allenai/tulu-v2-sft-mixture@train",
    "ultrachat": "HuggingFaceH4/ultrachat_200k@train_sft", "squad": "rajpurkar/squad@validation",
    "world_facts": PAPER + "world_facts.json", "capitals": PAPER + "country_capitals_only.json",
    "bio": PAPER + "famous_biographies.jsonl", "quotes": "Albertmade/memo-trap@train",
    "nq_swap": "pminervini/NQ-Swap@dev"}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

def require(holds, message, status=2):
    """Go on if `holds`; else end with one line on stderr: status 2 for bad input, 1 afterwards."""
    if not holds:
        if rank() == 0:  # all ranks fail alike: told once
            print(f"inversion.py: error: {message}", file=sys.stderr)
        raise SystemExit(status)

def load_rows(name):
    """Rows of a short name, file, folder or hub id, as a `datasets.Dataset`; ID@SPLIT picks a split
    other than train. Exits with one line that names it."""
    import datasets  # 0.8 s: only when rows are loaded
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures are told once, below
    source, _, split = SOURCES.get(name, name).partition("@")
    kind = FILE_TYPES.get(Path(source).suffix)
    try:
        if source.startswith(PAPER):
            source, _ = urllib.request.urlretrieve(source)
        if not kind:
            return datasets.load_dataset(source, split=split or "train")
        how = {"keep_default_na": False} if kind == "csv" else {}  # "NA" and "" are texts
        return datasets.load_dataset(kind, data_files=source, split="train", **how)
    except Exception as error:  # of many types; StopIteration if there are no rows
        require(False, f"{name}: no rows: {error.__cause__ or error!r:.200}; pass a file, folder, "
                f"hub id or one of {', '.join(SOURCES)}")

SHAPES = {  # a key that tells the shape: the keys of question, context, answers, memorised answers
    "sub_context": ("question", "sub_context", "sub_answer", "org_answer"),        # NQ-Swap
    "memory_answer": ("question", "context", "answer", "memory_answer"),           # World Facts
    "parametric_answer": ("question", "context", "answer", "parametric_answer"),   # CF_Bio
    "answers": ("question", "context", "answers", ""),    # SQuAD: its context is true
    "instruction": ("instruction", "input", "output", ""),  # Alpaca: its input may be missing
    "completion": ("prompt", "", "completion", "")}

def as_texts(row, key):
    """row[key] as a list of texts: of a text, a list of them, or SQuAD's dict with such a list."""
    value = row.get(key)
    if not key or key == "input" and value is None:  # Alpaca's may be missing
        return []
    value = value["text"] if isinstance(value, dict) else value
    value = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in value):
        raise ValueError(f"key {key!r} must be a text or a list of texts, and is {value!r:.60}")
    return [text.strip() for text in value]

def parse_row(row):
    """(messages, context, context's answers, memorised answers) of a row of any known shape. A chat
    marks no context, and one cannot be guessed. Raises ValueError and the like."""
    if row.get("messages") is not None:
        return [{"role": as_texts(message, "role")[0], "content": as_texts(message, "content")[0]}
                for message in row["messages"]], "", [], []
    if "classes" in row:  # memo-trap: an instruction with the odd ending, then a famous quote
        endings = ast.literal_eval(str(row["classes"]))  # the raw files hold a list as a text
        odd, usual = endings if int(row["answer_index"]) == 0 else endings[::-1]
        instruction, _, quote = as_texts(row, "prompt")[0].partition(": ")
        row = {"question": quote, "sub_context": instruction + ":", "sub_answer": odd,
               "org_answer": usual}
    for mark, keys in SHAPES.items():
        if mark in row:
            (question,), context, answers, memory = [as_texts(row, key) for key in keys]
            if "memory_answer" in row or "parametric_answer" in row:
                person = "parametric_answer" in row
                answers = sum([aliases(text, person) for text in answers], [])
                memory = sum([aliases(text, person) for text in memory], [])
            messages = question_and_answer(question, "".join(answers[:1]))
            if "instruction" in row:
                messages[0]["input"] = ""  # has a place of its own in the template of Alpaca
            return messages, "".join(context), answers, memory
    raise ValueError(f"it has none of the keys messages, classes, {', '.join(SHAPES)}")

def parse_rows(name):
    """[(row number, *parse_row)] of a data set; exits naming set, row and key."""
    found = []
    for number, row in enumerate(load_rows(name), 1):
        try:
            found.append((number, *parse_row(row)))
        except (ValueError, LookupError, TypeError, SyntaxError, AttributeError) as error:
            require(False, f"{name}, row {number}: {error!r:.200}")
    return found

def aliases(answer, person):
    """Texts that count as `answer`: 'La Paz (administrative); Sucre (judicial)' -> La Paz, Sucre;
    also a name in brackets, what stands before a comma, and a person's last name."""
    parts = re.split(r"; | or ", answer) if re.search("[;(]", answer) else [answer]
    names = [re.sub(r" *\([^()]*\)", "", part) for part in parts]
    heads = [name.split(", ")[0] for name in names]
    last = re.findall(r"(?<!\bthe) (\S{3,})$", answer) if person else []  # Catherine the Great
    return list(dict.fromkeys(names + heads + re.findall(r"\(([A-Z][^()]*)\)", answer) + last))

def scorable(answers, rivals, question):
    """The answers that have words, do not stand in the question (an echo would count as a hit), and
    are no alias that names the rival."""
    rival = plain(rivals[0]) if rivals else ""
    return [answer for i, answer in enumerate(answers) if words(answer)
            and plain(answer) not in plain(question) and not (i and plain(answer) in rival)]

def load_conflicts(name, flags):
    """The Conflicts of a set; what cannot be scored is dropped and counted."""
    world = make_world(flags.seed) if flags.model == "world" else {}
    if name in world:
        return world[name]
    rows, found, unscorable, echoes = parse_rows(name), {}, 0, 0
    for id, messages, context, answers, memory in rows:
        question = messages[0]["content"]
        mine, theirs = scorable(answers, memory, question), scorable(memory, answers, question)
        key = (context, question, *answers)
        if not context or not mine or plain(answers[0]) in map(plain, memory):
            unscorable += 1
        elif key not in found:
            found[key] = Conflict(id, question, context, mine, theirs, group=question)
            echoes += bool(memory) and not theirs
    print(f"{name}: {len(found)} of {len(rows)} items; left out: {unscorable} without an answer of",
          f"their own, and repeats;\n  {echoes} never count as parametric: their question says it")
    return list(found.values())

def load_examples(flags):
    """The Examples of --dataset; ids count the source's rows from 1."""
    if flags.dataset == "world":
        examples = make_world(flags.seed)["examples"]
    else:
        examples = [Example(*found[:3]) for found in parse_rows(flags.dataset)]
    return draw(examples, flags.num_examples, flags.seed)  # drawn, as mixtures are sorted

TEMPLATES = {"alpaca": (  # Stanford's: for Alpaca's own rows, context and question are apart
    "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('more than one turn') }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}Below is an instruction "
    "that describes a task{% if m.input %}, paired with an input that provides further context"
    "{% endif %}. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{{ m.question if m.input else m.content }}\n\n"
    "{% if m.input %}### Input:\n{{ m.input }}\n\n{% endif %}### Response:{% endif %}{% endfor %}"),
    "tulu": (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "{{ '<|' + m.role + '|>\n' + m.content }}{{ eos_token if m.role == 'assistant' else '' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")}

def set_template(tokenizer, examples, flags):
    """Settle --template by giving the tokenizer its chat_template: from here on all parts render
    with the tokenizer alone, and a saved model carries what it was trained with."""
    name, turns = flags.template, {len(example.messages) for example in examples}
    if name == "auto":
        name = "alpaca" if turns <= {2} else "tulu"
        name = "chat" if tokenizer.chat_template and turns != {2} else name
    require(name in TEMPLATES or tokenizer.chat_template, f"--template chat: {flags.model} has no "
            "chat template; try --template tulu")
    template = TEMPLATES.get(name) or tokenizer.get_chat_template()
    tokenizer.chat_template = re.sub(  # a date of today would make other prompts tomorrow
        r"strftime_now\([^)]*\)", "'1 January 2025'", template)
    parts = render(question_and_answer("Hi", "Hello"), tokenizer)
    require(not isinstance(parts, str), f"--template {name}: {parts}; try --template tulu")
    ids, bare = tokenizer("x").input_ids, tokenizer("x", add_special_tokens=False).input_ids
    prefix = tokenizer.decode(ids[:ids.index(bare[0])])  # what the tokenizer puts first: BOS
    if not parts[0][0].startswith(prefix):
        tokenizer.chat_template = prefix + tokenizer.chat_template

MARK = "@@the-answer@@"
@functools.lru_cache
def special_token(tokenizer):
    """Pattern of one of the tokenizer's special tokens, after white space."""
    tokens = [re.escape(token) for token in tokenizer.get_added_vocab() if token.strip()]
    return re.compile(r"\s*(" + "|".join(tokens) + ")")

def answer_place(turns, tokenizer):
    """(all that precedes an answer to these turns, what ends it) in the tokenizer's chat
    template, which is shown a mark in place of the answer: so a prompt does not depend on it."""
    def show(*answer, **how):
        return tokenizer.apply_chat_template(
            [*turns, *answer], tokenize=False, enable_thinking=False, **how).partition(MARK)

    mark, reply = {"role": "assistant", "content": MARK}, {"role": "user", "content": "Go on."}
    prompt, shown, rest = show(mark)
    if not shown:
        raise ValueError("it does not show the answer")
    ends = special_token(tokenizer).match
    end = ends(rest) or ends(show(mark, reply)[2])  # of this turn, or else at the start of the next
    if "<think>" in tokenizer.chat_template:
        opening = show(add_generation_prompt=True)[0].rstrip()
        if opening.endswith("<think>"):
            prompt = opening + "\n\n</think>\n\n"  # no thoughts
    return prompt, end[0] if end else tokenizer.eos_token

def render(messages, tokenizer, context=""):
    """A conversation in the tokenizer's chat template as [(text, supervised), ...], or the reason
    (a text) why it has none. Supervised: the answers, each with the one token that ends its turn;
    what the template writes before them, an empty think block say, is prompt."""
    turns = list(messages)
    if context:
        question = turns[0]["content"]
        turns[0] = turns[0] | {"content": f"{context}\n\n{question}", "question": question}
        if "input" in turns[0]:
            turns[0]["input"] = context
    parts, done = [], ""
    try:
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt, end = answer_place(turns[:i], tokenizer)
                if not prompt.startswith(done):  # it rewrites earlier turns: learn from here on
                    parts, done = [], ""
                bare = prompt.rstrip(" ")  # a space before an answer is part of its first token
                answer = prompt[len(bare):] + turn["content"] + end
                parts += [(bare[len(done):], False), (answer, True)]
                done = bare + answer
    except Exception as error:  # jinja raises nearly anything
        if messages[0]["role"] == "system" and len(messages) > 1:  # refused, perhaps: fold it
            content = f"{messages[0]['content']}\n\n{messages[1]['content']}"  # into the next turn
            return render([dict(messages[1], content=content), *messages[2:]], tokenizer, context)
        return f"the template refuses the turns ({error!r:.200})"
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if not parts or not all(answers) or turns[0]["role"] == "assistant":
        return "no response, an empty one, or one to nothing"
    return parts

def tokenize(messages, tokenizer, context=""):
    """render() as [(token ids, supervised), ...], or its reason. Each part is tokenised on its own,
    so that the ids of a prompt do not depend on what follows."""
    parts = render(messages, tokenizer, context)
    if isinstance(parts, str):
        return parts
    return [(tokenizer(text, add_special_tokens=False).input_ids, learn) for text, learn in parts]

def encode(examples, tokenizer, max_length):
    """(Rows of the examples, Counter of what was dropped or cut and why). Too long a row loses its
    last turns. As tokenize(), but in large batches, for which the tokenizer uses all cores."""
    rows, notes = [], collections.Counter()
    for start in tqdm(range(0, len(examples), 1000), "tokenise", leave=False, disable=None):
        rendered = []
        for example in examples[start:start + 1000]:
            parts = render(example.messages, tokenizer, example.context)
            if isinstance(parts, str):
                notes[f"dropped: {parts}"] += 1
            else:
                rendered.append((example.id, parts))
        texts = [text for _, parts in rendered for text, _ in parts]
        tokens = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else ())
        for id, parts in rendered:
            parts = [(next(tokens), supervised) for _, supervised in parts]
            lengths = itertools.accumulate(len(ids) for ids, _ in parts)
            fits = sum(length <= max_length for length in lengths) // 2 * 2  # prompt and answer
            rows += [to_row(id, parts[:fits])] if fits else []
            if fits < len(parts):
                notes["cut to the turns that fit --max-length" if fits
                      else "dropped: longer than --max-length"] += 1
    return rows, notes

# ================================================ 8. large models: several GPUs, adapters, --resume

def rank():
    """Number of this process: torchrun starts one per GPU."""
    return dist.get_rank() if dist.is_initialized() else 0

def ranks():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1

def deal(batches):
    """This rank's share of the batches, as (batch, True). All ranks get equally many, or they would
    wait for each other for ever: a short share is filled up with (a batch, False), not to count."""
    for i in range(rank(), math.ceil(len(batches) / ranks()) * ranks(), ranks()):
        yield batches[i % len(batches)], i < len(batches)

def in_batches(work, lengths, budget):
    """Results of work(indices), a list per batch, for sequences of these lengths: all of them, in
    order, on every rank. Batches hold similar lengths; each rank works on its share."""
    results = {}
    for indices, real in deal(micro_batches(lengths, budget)):
        found = work(indices)
        if real:
            results |= zip(indices, found)
    if ranks() > 1:
        shares = [None] * ranks()
        dist.all_gather_object(shares, results)
        results = dict(collections.ChainMap(*shares))
    return [results[i] for i in range(len(lengths))]

def shard(model, flags):
    """Spread weights, gradients and optimizer over the ranks with FSDP2, a decoder layer at a time:
    fp32 shards are the masters; a layer is gathered, in bf16 if asked for, while it computes."""
    from torch.distributed import device_mesh, fsdp
    mesh = device_mesh.init_device_mesh(flags.device.split(":")[0], (ranks(),))
    bf16 = torch.bfloat16 if flags.dtype == "bf16" else None
    policy = fsdp.MixedPrecisionPolicy(bf16, reduce_dtype=torch.float32)
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for module in [*layers, model]:
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fsdp.register_fsdp_forward_method(model, "generate")  # a PeftModel's gathers nothing by itself

def add_lora(model, flags):
    """The model with fp32 adapters on its linear layers. They are evaluated beside the weights;
    --save-model merges them."""
    try:
        import peft
    except ImportError:
        require(False, "--lora-rank needs a package that is not there: pip install peft")
    torch.manual_seed(flags.seed)
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=flags.lora_rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    return model

def write(path, save):
    """A file, whole or not at all: save(file) fills one beside it, renamed once it is on disk."""
    new = Path(f"{path}.new")
    try:
        with open(new, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        new.unlink(missing_ok=True)
        require(False, f"{path}: cannot be written: {error.__context__ or error!r:.200}; what was "
                "there before is kept", status=1)

def write_lines(path, lines):
    """A JSONL file of dicts."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write(path, lambda file: file.write(text.encode()))

WHOLE = dict(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
def save_checkpoint(model, optimizer, state, folder):
    """Replace checkpoint.pt by the state, trained weights and optimizer, unsharded: any number of
    ranks can go on from it. The order of the rows and dropout follow from seed and step."""
    weights = dcp.get_state_dict(model, optimizer, options=dcp.StateDictOptions(**WHOLE))
    write(folder / "checkpoint.pt", lambda file: torch.save([state, *weights], file))

def load_state(folder, flags):
    """(state, weights, optimizer) that a run goes on from: with --resume those of checkpoint.pt,
    else of step 0. The state is what the run adds to: the steps done, the metrics and outcomes so
    far, what the first evaluation knew and filter dropped."""
    kept = {name: value for name, value in flags._asdict().items() if name not in FREE}
    saved = [{"step": 0, "log": {"loss": None, "lr": None, "supervised_tokens": 0}, "known": {},
              "history": [], "outcomes": [], "dropped": [], "data": "", "flags": kept}, {}, {}]
    path = folder / "checkpoint.pt"
    if path.exists():
        try:
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # of many types
            require(False, f"{path}: is damaged ({error!r:.200}); without it --resume starts anew")
        changed = [f"--{name} {kept[name]} (was {was})" for name, was in saved[0]["flags"].items()
                   if kept[name] != was]
        require(not changed, f"--resume {folder}: would be another run with {', '.join(changed)}")
        print(f"{path}: going on after step {saved[0]['step']}")
    if ranks() > 1:  # rank 0 alone has the folder; restore() hands out the weights
        state = saved[:1]
        dist.broadcast_object_list(state)
        saved[:1] = state
    return saved

def restore(model, optimizer, saved):
    """Move a checkpoint's weights and optimizer out of `saved`, which would keep their memory, and
    in place, from rank 0 to all."""
    how = dcp.StateDictOptions(**WHOLE, broadcast_from_rank0=ranks() > 1)
    dcp.set_model_state_dict(model, saved.pop(0), options=how)  # set_state_dict does both, and
    dcp.set_optimizer_state_dict(model, optimizer, saved.pop(0), options=how)  # hangs elsewhere

def save_model(model, tokenizer, folder, flags):
    """Write the finetuned model, adapters merged in, as `from_pretrained` reads it."""
    model = model.merge_and_unload() if flags.lora_rank else model
    how = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=how) if ranks() > 1 else None
    if rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

# ============================================================================== 9. report

HEAD = "  step set              loss context_acc parametric_acc margin"

def table_row(line):
    """One row of the table that stands under HEAD."""
    text = f"{line['step']:6} {line['set'][-14:]:14} {line['loss'] or math.nan:7.3f}"
    text += f" {line['context_acc']:11.3f}"
    if "margin" in line:
        text += f" {line['parametric_acc']:14.3f} {line['margin']:6.2f}"
    return text

def draw_curves(lines, labels, path):
    """Draw context_acc over the steps from lines of metrics, a curve for each value of the columns
    `labels`; over several runs their mean, in a band of one standard deviation."""
    try:
        import matplotlib.figure
    except ImportError:
        return print(f"no {path.name}: pip install matplotlib")
    axes = matplotlib.figure.Figure().subplots()
    for label, group in pandas.DataFrame(lines).groupby(labels):
        acc = group.groupby("step")["context_acc"]
        mean, sd = acc.mean(), acc.std(ddof=0)
        axes.plot(mean.index, mean, ".-", label=", ".join(label))
        axes.fill_between(mean.index, mean - sd, mean + sd, alpha=0.15)
    axes.set(xlabel="optimizer steps", ylabel="context_acc", ylim=(0, 1.02))
    axes.legend(frameon=False)
    axes.figure.savefig(path, dpi=150)
    print(f"curves in {path}")

def report(state, sets, folder):
    """Print the verdict on each set; write curve.png and, last, summary.json."""
    outcomes = pandas.DataFrame(state["outcomes"]).groupby("set")
    summaries = {name: summarise(outcomes.get_group(name)) for name in sets}
    print("\ncontext_acc; rise and drop are measured on items that did not choose the peak:",
          pandas.DataFrame(summaries).to_string(float_format="{:.3f}".format), sep="\n")
    draw_curves(state["history"], ["set"], folder / "curve.png")
    write_lines(folder / "summary.json", [summaries])  # it marks a run that has finished

def compare(folders, path):
    """Print a table of finished runs, those that differ only in their seed as one line, and draw
    its curves to `path`."""
    runs, lines = [], []
    for folder in map(Path, folders):
        flags = json.loads((folder / "args.json").read_text())
        setting = {name: str(value) for name, value in flags.items() if name not in FREE}
        for name, found in json.loads((folder / "summary.json").read_text()).items():
            runs.append({"drop": math.nan} | setting | found | {"set": name})
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            lines.append(json.loads(line) | setting)
    runs = pandas.DataFrame(runs)
    labels = [name for name in setting if runs[name].nunique() > 1 and name != "seed"] + ["set"]
    groups = runs.groupby(labels)
    table = groups[["start", "peak", "final", "drop"]].mean().assign(
        drop_sd=groups["drop"].std(), n=groups.size())
    print(table.to_string(float_format="{:.2f}".format))
    draw_curves(lines, labels, path)

# ========================================================================= 10. flags and main

FLAGS = [  # (flag, default, type or choices, help); a list as default takes several
    ("--model", "world", str, "hub id or folder; world: a toy, made on the spot (WORLD_FLAGS)"),
    ("--dataset", "alpaca", str, "rows: alpaca, tulu, ultrachat, squad, file, folder, hub id"),
    ("--eval-set", ["world_facts"], str, "world_facts, capitals, bio, quotes, nq_swap, squad, ..."),
    ("--template", "auto", ["auto", "alpaca", "tulu", "chat"], "auto: alpaca for single turns, or "
     "chat (the tokenizer's own), or tulu"),
    ("--num-examples", None, int, "rows to use, drawn at random (paper: all)"),
    ("--subset", "all", ["all", "context", "no-overlap"], "section 4: only rows with a context, or "
     "that name nothing evaluated"),
    ("--max-length", 2048, int, "tokens; longer rows are dropped, chats cut after a whole turn"),
    ("--mitigation", "none", ["none", "filter", "counterfactual", "qk"], "filter: drop rows with a "
     "redundant context; counterfactual: add rows; qk: train query and key matrices only"),
    ("--mitigation-strength", None, float, "share filter drops (.25) or counterfactual adds (.1)"),
    ("--counterfactual-data", "nq_swap", str, "conflicts to add as rows (paper: NQ-Swap)"),
    ("--batch-size", 128, int, "examples per optimizer step (paper: 128)"),
    ("--micro-batch-tokens", 4096, int, "padded tokens per forward pass: memory, not results"),
    ("--epochs", 2.0, float, "passes over the rows (paper: up to 2)"),
    ("--max-steps", None, int, "optimizer steps at most; 0 only evaluates"),
    ("--lr", 1e-5, float, "peak learning rate, decays linearly (paper: 1e-4 or 1e-5)"),
    ("--warmup-frac", 0.03, float, "share of the steps that warm up linearly (paper: 0.03)"),
    ("--grad-clip", 1.0, float, "largest gradient norm; 0 never clips (paper: not stated)"),
    ("--activation-checkpointing", False, bool, "recompute activations: less memory, slower"),
    ("--lora-rank", 0, int, "train adapters of this rank (paper: 128); 0: all weights"),
    ("--checkpoint-every", None, int, "optimizer steps between checkpoints (None: never)"),
    ("--resume", False, bool, "go on from the checkpoint in OUT_DIR, with the same flags"),
    ("--eval-every", 50, int, "optimizer steps between evaluations (paper: 50)"),
    ("--eval-limit", None, int, "items per set, drawn once at random (paper: all)"),
    ("--eval-batch-tokens", 16384, int, "padded tokens of prompts answered together"),
    ("--max-new-tokens", 32, int, "tokens per answer (paper: not stated)"),
    ("--mechanism", False, bool, "how hard each kind of row pushes context reliance (section 5)"),
    ("--compare", [], str, "finished runs to put side by side; nothing is trained"),
    ("--device", None, str, "cpu, cuda, cuda:1, mps; None: the best there is"),
    ("--dtype", None, ["bf16", "fp32"], "arithmetic; None: bf16 autocast on CUDA"),
    ("--seed", 0, int, "order of the rows and every random draw"),
    ("--out-dir", None, str, "new folder for the run; None: runs/MITIGATION"),
    ("--save-model", False, bool, "write the finetuned model to OUT_DIR/model")]
STRENGTH = {"filter": 0.25, "counterfactual": 0.10}  # --mitigation-strength when not given
WORLD_FLAGS = {  # defaults with --model world
    "dataset": "world", "eval_set": ["world", "world_agreeing", "world_reading"],
    "template": "chat", "counterfactual_data": "world_train", "lr": 1e-3, "batch_size": 64,
    "max_length": 64, "max_steps": 480, "eval_every": 20, "max_new_tokens": 3, "mechanism": True}
FREE = {"resume", "checkpoint_every", "save_model", "out_dir", "device"}  # make no other run

def parse_flags(argv=None):
    """The flags above as a read-only tuple; exits with status 2 on values that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, kind, text in FLAGS:
        how = {"type": kind, "nargs": "+" if isinstance(default, list) else None}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if isinstance(kind, list):
            how = {"choices": kind}
        parser.add_argument(name, default=default, help=text, **how)
    first = parser.parse_args(argv)  # tells which defaults apply
    parser.set_defaults(**(WORLD_FLAGS if first.model == "world" else {}))
    require(not first.lora_rank or first.mitigation != "qk", "--lora-rank does not go with qk")
    parser.set_defaults(mitigation_strength=STRENGTH.get(first.mitigation),
                        device=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flags = parser.parse_args(argv)
    for name, value in vars(flags).items():
        if type(value) in (int, float):
            least = int(type(value) is int and name not in ("max_steps", "seed", "lora_rank"))
            most = 1 if name == "mitigation_strength" else 1e12
            require(least <= value <= most, f"--{name} {value}: must be between {least} and {most}")
    flags.dtype = flags.dtype or ("bf16" if "cuda" in flags.device else "fp32")
    return collections.namedtuple("Flags", vars(flags))(**vars(flags))

def load_pretrained(auto, source, flags, **how):
    """What `auto` reads from a hub id or folder, without running any of its code."""
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **how)
    except Exception as error:  # of many types: wrong name, no hub, torn files, other architecture
        require(False, f"--model {flags.model}: cannot be loaded as a causal LM ({error!r:.200}); "
                "pass a hub id or a local folder with config.json, tokenizer and .safetensors")

def load_model(source, tokenizer, flags):
    """The model with fp32 weights (bf16 where they are not trained and arithmetic is bf16), set to
    greedy answers that end where the template's turns end. Exits if it is no causal LM."""
    frozen = flags.max_steps == 0 or flags.lora_rank
    dtype = torch.bfloat16 if frozen and flags.dtype == "bf16" else torch.float32
    model, info = load_pretrained(transformers.AutoModelForCausalLM, source, flags, dtype=dtype,
                                  use_safetensors=True, output_loading_info=True)
    if ranks() == 1:  # otherwise its shards go there
        model.to(flags.device)
    ids = torch.tensor([[1, 2], [1, 3]], device=model.device)
    one, other = model.eval()(input_ids=ids).logits[:, 0].float()
    causal = torch.dist(one, other) <= 1e-4 * one.norm()  # a token does not see the ones after it
    require(causal and not info["missing_keys"], f"--model {flags.model} is no causal LM, or lacks "
            f"weights: {info['missing_keys']!r:.200}")
    own = model.generation_config.eos_token_id  # a token, several, or None
    turn = tokenize(question_and_answer("Hi", "Hello"), tokenizer)[-1][0]
    stops = {tokenizer.eos_token_id, turn[-1], *(own if isinstance(own, list) else [own])} - {None}
    model.generation_config = transformers.GenerationConfig(  # nothing inherited: no sampling
        do_sample=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(stops),
        pad_token_id=tokenizer.eos_token_id)
    return model

def load_data(source, flags):
    """(tokenizer, {name: Items}, Examples) of a run; exits on what cannot work."""
    tokenizer = load_pretrained(transformers.AutoTokenizer, source, flags)
    config = load_pretrained(transformers.AutoConfig, source, flags).get_text_config()
    require(tokenizer.eos_token and len(tokenizer) <= config.vocab_size,
            f"--model {flags.model}: its tokenizer has no EOS token, or more tokens than the model")
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    require(flags.max_length <= positions, f"--max-length {flags.max_length}: {flags.model} has "
            f"{positions} positions")
    examples = load_examples(flags) if flags.max_steps != 0 else []
    set_template(tokenizer, examples, flags)
    sets = {}
    for name in flags.eval_set:
        conflicts = draw(load_conflicts(name, flags), flags.eval_limit, seed=0)
        items = [to_item(conflict, tokenizer) for conflict in conflicts]
        items = [item for item in items if len(item.prompt) + flags.max_new_tokens <= positions]
        print(f"{name}: {len(conflicts) - len(items)} items are longer than the model's positions")
        require(items, f"{name}: no usable evaluation item")
        sets[name] = items
    return tokenizer, sets, examples

def open_folder(flags):
    """The folder of this run, made for it alone: OUT_DIR, or OUT_DIR-2, -3, ... where that is
    taken; with --resume the first of them that holds a checkpoint."""
    first = flags.out_dir or f"runs/{flags.mitigation}"
    for i in itertools.count(1):
        folder = Path(f"{first}-{i}" if i > 1 else first)
        if flags.resume and (folder / "checkpoint.pt").exists():
            return folder
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder

def experiment(flags):
    """One run: data, model, choice of rows, training with evaluation, report."""
    source = world_model(flags) if flags.model == "world" else flags.model
    tokenizer, sets, examples = load_data(source, flags)
    model = load_model(source, tokenizer, flags)
    probe, rows, total = {}, [], 0
    if flags.mechanism and examples:
        probe = probe_rows(model, tokenizer, examples, flags)
    if flags.mitigation == "qk":
        train_query_key_only(model)
    if flags.lora_rank:
        model = add_lora(model, flags)
    if flags.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if ranks() > 1:
        shard(model, flags)
    folder = open_folder(flags)
    state, *saved = load_state(folder, flags)
    if examples:
        examples = choose_examples(model, tokenizer, examples, sets, state, flags)
        rows, notes = encode(examples, tokenizer, flags.max_length)
        require(rows, f"{flags.dataset}: no usable row: {notes}")
        print(f"{flags.dataset}: {len(rows)} rows", dict(notes))
        total = math.ceil(flags.epochs * math.ceil(len(rows) / flags.batch_size))
        total = min(total, flags.max_steps or total)
    data = repr([sets, [(row.id, row.targets, row.input_ids.sum()) for row in rows]])
    data = hashlib.sha256(data.encode()).hexdigest()
    require(state["data"] in ("", data), f"--resume {folder}: its rows or items were others")
    state["data"] = data
    write_lines(folder / "args.json", [flags._asdict()])
    print(f"{model.num_parameters()} weights, {flags.dtype} on {flags.device}, {total} steps",
          f"\nfiles in {folder}\n\n{HEAD}")
    train(model, tokenizer, rows, sets, probe, total, state, saved, folder, flags)
    report(state, sets, folder)
    print("peak memory on the GPU:", torch.cuda.max_memory_allocated() >> 20, "MiB")
    if flags.save_model:
        save_model(model, tokenizer, folder / "model", flags)
    return state["history"]

def main(argv=None):
    """Do what the flags say; of a run, return the history: the lines of metrics.jsonl as dicts."""
    flags = parse_flags(argv)
    transformers.utils.logging.disable_progress_bar()
    if flags.compare:
        return compare(flags.compare, Path(flags.out_dir or "runs", "compare.png"))
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun sets it
        if flags.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # gloo on a CPU, NCCL on GPUs
    require(ranks() == 1 or flags.model != "world" and not flags.mechanism,
            "the world and --mechanism run in one process, without torchrun")
    if rank() == 0:
        return experiment(flags)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):  # writes and prints what rank 0 does, unseen
            return experiment(flags._replace(out_dir=f"{folder}/run"))

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        require(False, "interrupted; the evaluations so far are in the run's folder", 130)
    except OSError as error:
        require(False, f"{error!r:.200}", status=1)
