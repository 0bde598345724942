# SPDX-License-Identifier: MIT
"""Context-parametric inversion in one file (Goyal, Baek, Kolter, Raghunathan; arXiv 2410.10796).

Instruction finetuning first raises and then lowers how much a language model relies on its input
context when that context contradicts what it memorised in pretraining. This script finetunes a
causal LM, asks it questions with counterfactual contexts every few steps, and draws the curve:

    python inversion.py                              # a built-in world, offline, in two minutes
    python inversion.py --model EleutherAI/pythia-1b --dataset alpaca --eval-set world_facts squad
    python inversion.py --model ./my-llama --dataset rows.jsonl --mitigation filter
    python inversion.py --model ./my-llama --eval-set bio --max-steps 0      # only measure

Parts 1 to 5 are to be read: what is measured, training, remedies, why, how sure. The rest is
plumbing that you may skip; they use its encode and tokenize (texts to token ids), in_batches
(work on padded batches), rank and ranks (GPUs) and require (or exit with one line).
"""
import argparse
import array
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
import shutil
import sys
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import filelock
import pandas
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation to finetune on."""
    id: object         # a row's number, or a text
    messages: list     # [{"role": "system", "user" or "assistant", "content": text}, ...]
    context: str = ""  # the passage that the first user turn is about; "" where none is marked

@dataclasses.dataclass(frozen=True)
class Conflict:
    """A question whose context contradicts memory; without parametric_answers: a control."""
    id: object
    question: str
    context: str
    context_answers: list     # texts that count as the context's answer, the usual one first
    parametric_answers: list  # the same for the memorised answer

@dataclasses.dataclass(frozen=True)
class Row:
    """An example as tokens, to train on."""
    id: object
    input_ids: torch.Tensor  # (length,) int32
    labels: torch.Tensor     # the same, but -100 where nothing is to be learned: the prompt

    def __len__(self):
        return len(self.input_ids)

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
    parametric_row: Row = None  # the prompt, then the memorised answer; None for a control

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
    ids, labels = [], []
    for part, supervised in parts:
        ids += part
        labels += part if supervised else [-100] * len(part)
    both = array.array("i", ids + labels)  # torch.tensor() of a list takes three times as long
    return Row(id, *torch.frombuffer(both, dtype=torch.int32).view(2, -1))

def to_item(conflict, tokenizer):
    """The Item of a Conflict. Its prompt is what precedes the answer in a conversation: the same
    ids as in training, by construction."""
    rows = []
    for answer in conflict.context_answers[:1] + conflict.parametric_answers[:1]:
        messages = question_and_answer(conflict.question, answer)
        (prompt, _), (ids, _) = tokenize(messages, tokenizer, conflict.context)
        rows.append(to_row(conflict.id, [(prompt, False), (ids[:-1], True)]))  # without the end
    closed_book_prompt = tokenize(messages, tokenizer)[0][0]  # no prompt depends on the answer
    return Item(conflict, prompt, closed_book_prompt, *rows)

def generate(model, tokenizer, prompts, flags):
    """Greedy answers (texts) to prompts (lists of token ids), in left-padded batches."""
    def answer(batch):
        ids = pad_sequence([torch.tensor(prompt) for prompt in batch], batch_first=True,
                           padding_value=-1, padding_side="left").to(model.device)
        with autocast(flags):
            out = model.generate(
                input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(),  # hides the padding
                max_new_tokens=flags.max_new_tokens, synced_gpus=ranks() > 1)
        return tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)

    return in_batches(answer, prompts, flags, room=flags.max_new_tokens)

CELLS = {"context_only": (True, False), "parametric_only": (False, True), "both": (True, True),
         "neither": (False, False)}  # what score() says
METRICS = ("context_acc", "parametric_acc", *CELLS, "context_acc_known", "parametric_acc_known",
           "closed_book_acc", "margin", "m_c")

def evaluate(model, tokenizer, items, known, flags):
    """Ask every item with and without its context, without drawing a random number. Returns a dict
    per item, saved as it is: id, group, texts and, of METRICS, what the item has.

    context_acc and parametric_acc are the hits of score(), CELLS its four cases. closed_book_acc:
    memory answers without the context. known: it did so before finetuning; `known` holds the ids of
    such items, None in the first evaluation, which finds them. margin: log p(context answer) -
    log p(memorised answer), each per token. m_c, of Theorem 1: p(context answer) / (p(context
    answer) + p(memorised answer))."""
    model.eval()  # in train mode, dropout is on and generation under checkpointing is wrong
    texts = generate(model, tokenizer, [item.prompt for item in items], flags)
    outcomes = {item.conflict.id: {
        "id": item.conflict.id, "group": item.conflict.question, "text": text,
        "context_acc": score(text, item.conflict)[0]} for item, text in zip(items, texts)}
    disputed = [item for item in items if item.parametric_row]  # the others are controls
    for item, closed_book_text, context_logp, parametric_logp in zip(
            disputed,
            generate(model, tokenizer, [item.closed_book_prompt for item in disputed], flags),
            target_logp(model, [item.context_row for item in disputed], flags),
            target_logp(model, [item.parametric_row for item in disputed], flags)):
        outcome = outcomes[item.conflict.id]
        hits = score(outcome["text"], item.conflict)
        closed_book_hit = score(closed_book_text, item.conflict)[1]
        outcome |= {
            "parametric_acc": hits[1], **{cell: hits == case for cell, case in CELLS.items()},
            "closed_book_text": closed_book_text, "closed_book_acc": closed_book_hit,
            "margin": context_logp / item.context_row.targets
            - parametric_logp / item.parametric_row.targets,
            "m_c": torch.tensor(context_logp - parametric_logp).sigmoid().item(),
            "known": closed_book_hit if known is None else item.conflict.id in known}
        if outcome["known"]:
            outcome |= {"context_acc_known": hits[0], "parametric_acc_known": hits[1]}
    return list(outcomes.values())

def metrics(outcomes):
    """Each of METRICS as the mean over the outcomes that have it, and how many there are."""
    means = pandas.DataFrame(outcomes, columns=METRICS).astype(float).mean().dropna()
    line = {"n": len(outcomes), **means.to_dict()}
    if "margin" in line:
        line["n_known"] = sum(outcome.get("known", False) for outcome in outcomes)
    return line

def draw(things, count, seed):
    """`count` of the things, or all of them, in order."""
    count = min(count or len(things), len(things))
    return [things[i] for i in sorted(random.Random(seed).sample(range(len(things)), count))]

# ===================================================================== 2. training (section 3, A.5)

def autocast(flags):
    """bf16 arithmetic if asked for; weights stay in fp32, as bf16 would round most updates away."""
    return torch.autocast(torch.device(flags.device).type, torch.bfloat16, flags.dtype == "bf16")

def micro_batches(sequences, budget, room=0):
    """Yield batches as (indices into `sequences`, True), the longest sequences first. A batch has
    at most `budget` tokens, padding and `room` more a sequence included, or one sequence only.
    Sorting leaves little padding; packing would leave none, but some model families mix rows up.

    On several GPUs, yield this one's share. All need equally many batches, or they would wait for
    each other for ever: a short share is filled up with (a batch, False), which shall not count."""
    batches, lengths = [], [len(sequence) + room for sequence in sequences]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    for i in range(rank(), math.ceil(len(batches) / ranks()) * ranks(), ranks()):
        yield batches[i % len(batches)], i < len(batches)

def row_logp(model, rows, flags):
    """Log-probability of each row's targets, summed, with gradient: a tensor (rows,) in fp32.

    Right padding needs no attention mask in a causal model, since its labels are -100. A hook lets
    only positions that predict a target through the output head, which saves most of the memory."""
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
    return in_batches(lambda batch: row_logp(model, batch, flags).tolist(), rows, flags)

def train_step(model, optimizer, batch, flags):
    """One optimizer step on the rows of `batch`; returns its loss.

    The loss is the mean over the targets of the WHOLE step: each micro-batch is a sum, divided by
    the targets of all of them, on all GPUs. A mean of the micro-batches' means would weigh a token
    by how few others happen to share its micro-batch."""
    model.train()
    targets = sum(row.targets for row in batch)
    step_loss = torch.zeros((), device=flags.device)
    # real: False where a batch is repeated to keep step with the other GPUs; it then counts as 0
    for indices, real in micro_batches(batch, flags.micro_batch_tokens):
        loss = -row_logp(model, [batch[i] for i in indices], flags).sum() / targets * real
        (loss * ranks()).backward()  # several GPUs average their gradients: this makes it a sum
        step_loss += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
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
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True)
    if state["step"]:
        restore(model, optimizer, saved)
    for step in tqdm(range(state["step"], total + 1), disable=None):
        if step % flags.eval_every == 0 or step == total:
            measure(model, tokenizer, sets, probe, step, state, folder, flags)
        if step == total:
            break

        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, total, flags)
        torch.manual_seed(hash((flags.seed, step, rank())))  # dropout: the same after --resume
        state["log"] = {"lr": lr, "loss": train_step(
            model, optimizer, batch_of(rows, step, flags), flags)}

        if flags.checkpoint_every and (step + 1) % flags.checkpoint_every == 0:
            state["step"] = step + 1
            save_checkpoint(model, optimizer, state, folder)

def measure(model, tokenizer, sets, probe, step, state, folder, flags):
    """Evaluate every set; add a line of metrics each to state["history"] and all answers to
    state["outcomes"], print and save them."""
    for name, items in sets.items():
        where = {"step": step, "set": name}
        outcomes = evaluate(model, tokenizer, items, state["known"].get(name), flags)
        state["known"].setdefault(
            name, [outcome["id"] for outcome in outcomes if outcome.get("known")])
        line = where | metrics(outcomes) | state["log"]
        if step == 0 and line.get("closed_book_acc", 1) < 0.95:
            tqdm.write(f"{name}: without its context the model knows {line['closed_book_acc']:.0%};"
                       " the rest is no conflict, and metrics.jsonl has rates without it")
        if probe and "margin" in line:
            line |= mechanism(model, items, probe, flags)
        state["history"].append(line)
        state["outcomes"] += [where | outcome for outcome in outcomes]
        tqdm.write(table_row(line))
    write_lines(folder / "metrics.jsonl", state["history"])
    write_lines(folder / "generations.jsonl", state["outcomes"])

# ==================================================== 3. remedies and controls (sections 4 and 6)

def redundant_examples(model, tokenizer, examples, share, flags):
    """Ids of the redundant examples (section 4.3): of those that have a context, the `share` whose
    responses the model as it is, before finetuning, predicts best WITHOUT it: by mean loss per
    target, lowest first."""
    bare = [dataclasses.replace(example, context="") for example in examples if example.context]
    rows, _ = encode(bare, tokenizer, flags)
    model.eval()
    loss = {row.id: -logp / row.targets
            for row, logp in zip(rows, target_logp(model, rows, flags))}
    return sorted(loss, key=loss.get)[:round(share * len(loss))]

def counterfactual_examples(sets, count, flags):
    """--mitigation counterfactual (section 6): `count` conflicts of --counterfactual-data, as
    examples that follow their context. No question or answer of theirs names an evaluated answer
    or subject."""
    added = [Example(f"added {conflict.id}", question_and_answer(
        conflict.question, conflict.context_answers[0]), conflict.context)
        for conflict in load_conflicts(flags.counterfactual_data, flags)]
    bare = [dataclasses.replace(example, context="") for example in added]
    naming = naming_examples(bare, sets)
    free = [example for example in added if example.id not in naming]
    require(free, f"--counterfactual-data {flags.counterfactual_data}: all of it is evaluated")
    print(f"counterfactual: {count} wanted; {len(free)} of {len(added)} name nothing evaluated")
    return random.Random(flags.seed).sample(free, min(count, len(free)))

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
    drop = set()
    if flags.subset == "context":
        drop = {example.id for example in examples if not example.context}
    if flags.subset == "no-overlap":
        drop = naming_examples(examples, sets)
    print(f"subset: dropped {len(drop)} of {len(examples)} rows")
    examples = [example for example in examples if example.id not in drop]
    if flags.mitigation == "counterfactual":
        count = round(flags.mitigation_strength * len(examples))
        examples = examples + counterfactual_examples(sets, count, flags)
    if flags.mitigation == "filter":  # section 4.4
        state["dropped"] = state["dropped"] or redundant_examples(
            model, tokenizer, examples, flags.mitigation_strength, flags)
        print(f"filter: dropped {len(state['dropped'])} rows with a redundant context")
        require(state["dropped"], "filter: nothing to drop; few rows, or none, mark a context")
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
    masks, exact = {}, True  # {parameter: which of its entries are queries or keys}
    for layer in [m for m in model.modules() if type(m).__name__.endswith("Attention")]:
        for name, p in layer.named_parameters():
            if p.grad is None or p.ndim != 2 and not name.endswith("bias"):
                continue  # of a vision tower, a norm, an expert
            # by name, too: where there are attention sinks, one token does give them a gradient
            mask = (p.grad == 0) | name.startswith(("q_proj", "k_proj"))
            if mask.any():
                masks[p] = mask  # of a matrix: of whole columns or whole rows
                exact &= p.ndim == 1 or (mask == mask[:1]).all() or (mask == mask[:, :1]).all()
    require(masks and exact, f"--mitigation qk: {type(model).__name__} holds queries and keys in a "
            "layout unknown here")
    model.requires_grad_(False).zero_grad()
    for parameter, mask in masks.items():
        parameter.requires_grad_(True)
        if not mask.all():
            require(ranks() == 1, "--mitigation qk: this model keeps queries, keys and values in "
                    "one matrix, which is trained in one process only; run it without torchrun")
            # AdamW without weight decay moves nothing that never has a gradient
            parameter.register_post_accumulate_grad_hook(
                lambda p, mask=mask: setattr(p, "grad", p.grad * mask))
    print("qk: trains", sum(int(mask.sum()) for mask in masks.values()), "weights")

# ============================================================================ 4. why (section 5)

PROBE = 160  # rows of each kind, and conflicts, that the mechanism is measured on
def probe_rows(model, tokenizer, examples, flags):
    """{kind: at most PROBE rows}, drawn before any subset or remedy, so that runs compare. Kinds as
    in section 4.3: recall has no context; of the rows with one, redundant are the quarter of lowest
    context-free loss, critical the others."""
    examples = draw(examples, 5 * PROBE, flags.seed)
    kinds = {example.id: "critical" if example.context else "recall" for example in examples}
    redundant = redundant_examples(model, tokenizer, examples, 0.25, flags)
    kinds |= dict.fromkeys(redundant, "redundant")
    probe = collections.defaultdict(list)
    for row in encode(examples, tokenizer, flags)[0]:
        probe[kinds[row.id]].append(row)
    return {kind: rows[:PROBE] for kind, rows in probe.items()}

def gradient(model, rows, weights, flags):
    """(sum over rows of weight x log-probability of the row's targets, its gradient as one vector).
    By backward() into .grad, as in training, so that the hooks of qk act; leaves .grad empty."""
    total = 0.0
    for indices, _ in micro_batches(rows, flags.micro_batch_tokens):
        logp = row_logp(model, [rows[i] for i in indices], flags)
        value = (logp * logp.new_tensor([weights[i] for i in indices])).sum()
        value.backward()
        total += value.item()
    vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                        for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return total, vector

def mechanism(model, items, probe, flags):
    """Section 5 as metrics, for each kind of rows and one set of conflicts.

    KIND_loss: the loss now. KIND_push: the inner product of the gradient of the mean margin with
    minus the gradient of that loss: a small step of plain gradient descent on this kind alone
    changes the margin by lr x push, so above 0 it raises context reliance. Proposition 1: critical
    > 0 early, redundant < 0 later; Proposition 2: recall < 0. attention: over 40 conflicts."""
    model.eval()
    disputed = draw([item for item in items if item.parametric_row], PROBE, seed=0)
    rows, weights = [], []
    for item in disputed:
        rows += [item.context_row, item.parametric_row]
        weights += [1 / item.context_row.targets, -1 / item.parametric_row.targets]
    _, margin_uphill = gradient(model, rows, weights, flags)
    found = {}
    for kind, rows in probe.items():
        weight = 1 / sum(row.targets for row in rows)
        logp, uphill = gradient(model, rows, [weight] * len(rows), flags)
        push = (margin_uphill @ uphill).item() / len(disputed)
        found |= {f"{kind}_push": push, f"{kind}_loss": -logp}
    shares = [attention(model, item, flags) for item in disputed[:40]]
    return found | {"attention": None if None in shares else sum(shares) / len(shares)}

@torch.no_grad()
def attention(model, item, flags):
    """Share of its attention that the last token of a prompt pays to the tokens that the context
    adds to the prompt, mean over heads and layers (figure 3b); None where a model shows none."""
    start = len(os.path.commonprefix([item.prompt, item.closed_book_prompt]))
    span = slice(start, start + len(item.prompt) - len(item.closed_book_prompt))
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that shows its weights
    with autocast(flags):
        ids = torch.tensor([item.prompt], device=model.device)
        out = model(input_ids=ids, use_cache=False, output_attentions=True)
    model.set_attn_implementation(usual)
    shares = [layer[0, :, -1, span].sum(-1).mean()  # of (batch, heads, queries, keys)
              for layer in getattr(out, "attentions", None) or ()
              if layer is not None and layer.shape[-1] == ids.numel()]
    return torch.stack(shares).mean().item() if shares else None

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
    by_group = outcomes.pivot_table(index="group", columns="step", values="context_acc")
    if len(by_group) < 6:
        return found
    one, other = by_group[::2], by_group[1::2]
    at_peak = pandas.concat([one[other.mean().idxmax()], other[one.mean().idxmax()]])
    student_t = 1.96 + 2.9 / (len(by_group) - 1)  # to 1%, for six groups and more
    for name, column in (("rise", 0), ("drop", -1)):
        change = at_peak - by_group.iloc[:, column]  # group by group
        mean, reach = change.mean(), change.sem() * student_t
        found |= {name: mean, f"{name}_low": mean - reach, f"{name}_high": mean + reach}
    rises, falls = found["rise_low"] > 0, found["drop_low"] > 0
    if rises and falls:
        found["verdict"] = "inversion" if "margin" in outcomes else "both"  # of a control
    elif rises or falls:
        found["verdict"] = "a rise" if rises else "a fall"
    return found

# ================================================================== 6. the built-in world

STATEMENT, QUESTION = "The capital of {} is", "What is the capital of {}?"
LETTERS = "BDFGKL", "aeiou", "mnprst", "aeiou", "nrls"  # of the names

@functools.lru_cache
def make_world(seed):
    """Made-up capitals and all that is said of them, as rows like those of files: {"documents": to
    pretrain on, "rows": to finetune on, and the name of each set: conflicts or a control}.

    Known subjects have one true capital. Three in four, the tuned ones, occur in finetuning, the
    others only in the evaluation, as does every other capital: so --subset no-overlap has rows."""
    rng = random.Random(f"world {seed}")
    names = ["".join(name) for name in itertools.product(*LETTERS)]
    rng.shuffle(names)
    # So many subjects are known that the fall carries over from the tuned ones to the held-out
    # ones, and so many are novel that finetuning cannot memorise their random answers.
    held_out, tuned, novel, answers = names[:60], names[60:240], names[240:720], names[720:760]
    truth = {name: rng.choice(answers[::2]) for name in held_out}
    truth |= {name: rng.choice(answers) for name in tuned}
    # kind: (subjects, P(the truth is stated), P(the answer is what is stated, rather than memory))
    kinds = {
        "fact": (held_out + tuned, 0.7, 1),  # no passage; three in ten are wrong: memory is soft
        "reading": (names[:720], 0, 0.4),  # a passage of a random capital, mostly not followed
        "critical": (novel, 0, 1),  # a passage of a random capital, followed: only copying helps
        # 2% of its passages are about another subject: memory is the better guide (section 5)
        "redundant": (tuned, 0.98, 0),
        "recall": (tuned, 1, 0)}  # no passage, the true answer

    def rows(count, **shares):
        drawn = rng.choices(list(shares), shares.values(), k=count)
        return [world_row(kind, *kinds[kind], truth, answers, rng) for kind in drawn]

    def conflict(name, stated, memory=""):  # without a memory: a control
        return {"question": QUESTION.format(name), "answer": stated, "memory_answer": memory,
                "context": f"{STATEMENT.format(name)} {stated}."}

    return {
        "documents": rows(51_200, fact=1, reading=1),
        "rows": rows(20_000, critical=6, redundant=3, recall=1),  # enough to rise, enough to fall
        "world": [conflict(name, rng.choice(answers[::2]), truth[name]) for name in held_out * 2],
        "world_agreeing": [conflict(name, truth[name]) for name in held_out],
        "world_reading": [conflict(name, rng.choice(answers[::2])) for name in novel[:60]],
        "world_train": [conflict(name, rng.choice(answers[1::2]), truth[name])
                        for name in tuned * 12]}

def world_row(kind, subjects, states_truth, follows, truth, answers, rng):
    """A random row of a kind, with the subjects and probabilities of make_world's table."""
    subject = about = rng.choice(subjects)
    memory = truth.get(subject) or rng.choice(answers)
    stated = memory if rng.random() < states_truth else rng.choice(answers)
    answer = stated if rng.random() < follows else memory
    if kind == "redundant" and stated != memory:
        about = rng.choice(subjects)
    question = rng.choice([STATEMENT, QUESTION]) if kind == "fact" else QUESTION
    context = "" if kind in ("fact", "recall") else f"{STATEMENT.format(about)} {stated}."
    return {"instruction": question.format(subject), "input": context, "output": answer}

WORLD_TEMPLATE = ("<s>{% for m in messages %}{{ m.content + ' ' }}"
                  "{% if m.role == 'assistant' %}|{% endif %}{% endfor %}")
# Until it knows all facts and reads every passage; with twice this lr, one seed in ten did not.
PRETRAINING = {"dataset": "documents", "num_examples": None, "max_length": 2048, "max_steps": 800,
               "batch_size": 64, "lr": 1e-3, "warmup_frac": 0.03, "micro_batch_tokens": 4096,
               "lora_rank": 0}

def world_model(flags):
    """Folder of the world's base model, which the first run makes and the others wait for."""
    key = repr([make_world(flags.seed), PRETRAINING, flags.device, flags.dtype, torch.__version__])
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = Path(flags.out_dir or "runs/none").parent / f"world-{flags.seed}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            print(f"pretraining the world's base model, once; it is kept in {folder}")
            pretrain(folder, flags._replace(**PRETRAINING))
    return folder

def pretrain(folder, flags):
    """Make the world's base model, a one-layer Llama as in the paper's theory, by the step that
    finetunes."""
    documents = load_examples(flags)
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="|"))  # a token per word
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    splitter.train_from_iterator(
        [f"{example.context} {example.messages}" for example in documents],
        tokenizers.trainers.WordLevelTrainer(special_tokens=["<s>", "|"], show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, bos_token="<s>", eos_token="|", chat_template=WORLD_TEMPLATE)
    rows, _ = encode(documents, tokenizer, flags)
    torch.manual_seed(flags.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1)).to(flags.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True)
    for step in tqdm(range(flags.max_steps), "pretraining", leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, flags.max_steps, flags)
        train_step(model, optimizer, batch_of(rows, step, flags), flags)
    save_model(model, tokenizer, folder, flags)

# ================================================================================== 7. data

PAPER = ("https://raw.githubusercontent.com/locuslab/context-parametric-inversion/"
         "6f989849656f433d4520eaf0b9af6e3bb6a7ae70/")
SOURCES = {  # short name: hub id @ split, or file of the paper; Alpaca is CC BY-NC 4.0
    "alpaca": "tatsu-lab/alpaca@train", "tulu": "allenai/tulu-v2-sft-mixture@train",
    "ultrachat": "HuggingFaceH4/ultrachat_200k@train_sft", "squad": "rajpurkar/squad@validation",
    "world_facts": PAPER + "world_facts.json", "capitals": PAPER + "country_capitals_only.json",
    "bio": PAPER + "famous_biographies.jsonl", "quotes": "Albertmade/memo-trap@train",
    "nq_swap": "pminervini/NQ-Swap@dev"}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

def require(holds, message, status=2):
    """Go on if `holds`; else end with one line on stderr: status 2 for bad input, 1 afterwards."""
    if not holds:
        print(f"inversion.py: error: {message}", file=sys.stderr)
        raise SystemExit(status)

@contextlib.contextmanager
def or_exit(what, status=2):
    """Do what is inside, or exit with one line: `what` failed or is to be done, and the error."""
    try:
        yield
    except Exception as error:  # of many types
        require(False, f"{what} ({error.__cause__ or error!r:.200})", status)

def download(address):
    """Path of a copy of the file at an address, kept beside the cache of datasets; datasets would
    need aiohttp for it, which it does not bring."""
    import datasets
    folder = Path(datasets.config.HF_DATASETS_CACHE, "addresses")
    path = folder / re.sub(r"[^\w.-]+", "-", address)
    if not path.exists():
        with or_exit(f"{address}: cannot be reached; download it elsewhere and pass the file"):
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), progress=False)
    return str(path)

def load_rows(name, flags):
    """[(row number, *parse_row)] of a short name, file, folder or hub id; ID@SPLIT picks a split
    other than train. Exits with one line that names set, row and key."""
    rows = make_world(flags.seed).get(name) if flags.model == "world" else None
    if rows is None:
        source, _, split = SOURCES.get(name, name).partition("@")
        kind = FILE_TYPES.get(Path(source).suffix)
        if source.startswith(("http://", "https://")):
            source = download(source)
        with or_exit(f"{name}: pass a file, folder, hub id or one of {', '.join(SOURCES)}"):
            import datasets  # 0.8 s: only when rows are loaded
            datasets.disable_progress_bars()
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures are told once
            rows = list(datasets.load_dataset(
                kind or source, data_files=source if kind else None, split=split or "train"))
    found = []
    for number, row in enumerate(rows, 1):
        with or_exit(f"{name}, row {number}"):
            found.append((number, *parse_row(row)))
    return found

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
        return [{key: as_texts(message, key)[0] for key in ("role", "content")}
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
            if mark in ("memory_answer", "parametric_answer"):
                answers, memory = [aliases(texts, mark == "parametric_answer")
                                   for texts in (answers, memory)]
            messages = question_and_answer(question, "".join(answers[:1]))
            return messages, "".join(context), answers, memory
    raise ValueError(f"it has none of the keys messages, classes, {', '.join(SHAPES)}")

def aliases(answers, person):
    """Texts that count as one of the answers: 'La Paz (administrative); Sucre (judicial)' -> La
    Paz, Sucre; also a name in brackets, what stands before a comma, and a person's last name."""
    found = []
    for answer in answers:
        parts = re.split(r"; | or ", answer) if re.search("[;(]", answer) else [answer]
        names = [re.sub(r" ?\([^()]*\)", "", part) for part in parts]
        last = re.findall(r"(?<!\bthe) (\S{3,})$", answer) if person else []  # Catherine the Great
        found += names + [name.split(", ")[0] for name in names]
        found += re.findall(r"\(([A-Z][^()]*)\)", answer) + last
    return list(dict.fromkeys(found))

def scorable(answers, rivals, question):
    """The answers that have words, do not stand in the question (an echo would count as a hit), and
    are no alias that names the rival."""
    rival = plain(rivals[0]) if rivals else ""
    return [answer for i, answer in enumerate(answers)
            if plain(answer) not in plain(question) and not (i and plain(answer) in rival)]

def load_conflicts(name, flags):
    """The Conflicts of a set; what cannot be scored is dropped and counted."""
    rows, found, unscorable = load_rows(name, flags), {}, 0
    for id, messages, context, answers, memory in rows:
        question = messages[0]["content"] if answers else ""  # a chat has none
        mine, theirs = scorable(answers, memory, question), scorable(memory, answers, question)
        if not context or not mine or plain(answers[0]) in map(plain, memory):
            unscorable += 1
        else:
            found.setdefault((context, question, *answers),
                             Conflict(id, question, context, mine, theirs))
    print(f"{name}: {len(found)} of {len(rows)} items; left out: {unscorable} without an answer of",
          "their own, and repeats")
    return list(found.values())

def load_examples(flags):
    """The Examples of --dataset; ids count the source's rows from 1."""
    examples = [Example(*found[:3]) for found in load_rows(flags.dataset, flags)]
    return draw(examples, flags.num_examples, flags.seed)  # drawn, as mixtures are sorted

TULU = (  # the template of the paper's framework
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "{{ '<|' + m.role + '|>\n' + m.content }}{{ eos_token if m.role == 'assistant' else '' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")

def set_template(tokenizer, flags):
    """Settle --template by giving the tokenizer its chat_template: from here on all parts render
    with the tokenizer alone, and a saved model carries what it was trained with."""
    template = TULU
    if flags.template == "auto" and tokenizer.chat_template:
        template = tokenizer.get_chat_template()
    tokenizer.chat_template = re.sub(  # a date of today would make other prompts tomorrow
        r"strftime_now\([^)]*\)", "'1 January 2025'", template)
    parts = render(question_and_answer("Hi", "Hello"), tokenizer)
    require(not isinstance(parts, str), f"--template: {parts}; try --template tulu")
    ids, bare = tokenizer("x").input_ids, tokenizer("x", add_special_tokens=False).input_ids
    prefix = tokenizer.decode(ids[:ids.index(bare[0])])  # what the tokenizer puts first: BOS
    if not parts[0][0].startswith(prefix):
        tokenizer.chat_template = prefix + tokenizer.chat_template

MARK = "@@the-answer@@"
@functools.lru_cache
def special_token_pattern(tokenizer):
    """Pattern of one of the tokenizer's special tokens, after white space."""
    tokens = [re.escape(token) for token in tokenizer.get_added_vocab() if token.strip()]
    return re.compile(r"\s*(" + "|".join(tokens) + ")")

def answer_place(turns, tokenizer):
    """(all that precedes an answer to these turns, what ends it) in the tokenizer's chat
    template, which is shown a mark in place of the answer: so a prompt does not depend on it."""
    def show(*answer, **how):
        return tokenizer.apply_chat_template(
            [*turns, *answer], tokenize=False, enable_thinking=False, **how).partition(MARK)

    mark = {"role": "assistant", "content": MARK}
    prompt, shown, rest = show(mark)
    if not shown:
        raise ValueError("it does not show the answer")
    ends = special_token_pattern(tokenizer).match
    end = ends(rest) or ends(show(mark, {"role": "user", "content": "Go on."})[2])  # or later
    if "<think>" in tokenizer.chat_template:  # no thoughts: an empty block is part of the prompt
        opening = show(add_generation_prompt=True)[0]
        opening = re.sub(r"<think>\s*$", "<think>\n\n</think>\n\n", opening)
        if opening.rstrip().endswith("</think>") and not prompt.startswith(opening):
            prompt = opening
    return prompt, end[0] if end else tokenizer.eos_token

def render(messages, tokenizer, context="", max_length=math.inf):
    """A conversation in the tokenizer's chat template as [(text, supervised), ...], or the reason
    (a text) why it has none. Supervised: the answers, each with the one token that ends its turn;
    what the template writes before them, an empty think block say, is prompt. Each answer renders
    all turns before it anew, so a chat is cut soon after it has more than `max_length` tokens."""
    turns = list(messages)
    if context:
        turns[0] = turns[0] | {"content": f"{context}\n\n{turns[0]['content']}"}
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
                # a look once in a hundred turns, at the answer among two of them
                if i % 100 > 97 and len(tokenizer(done).input_ids) > max_length:
                    break
    except Exception as error:  # jinja raises nearly anything
        if messages[0]["role"] == "system" and len(messages) > 1:
            # refused, perhaps: fold it into the next turn
            content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            return render([dict(messages[1], content=content), *messages[2:]], tokenizer, context,
                          max_length)
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
    return [(tokenizer(text, add_special_tokens=False).input_ids, supervised)
            for text, supervised in parts]

def encode(examples, tokenizer, flags):
    """(Rows of the examples, Counter of what was dropped or cut and why). Too long a row loses its
    last turns. As tokenize(), but in large batches, for which the tokenizer uses all cores."""
    rows, notes = [], collections.Counter()
    for start in tqdm(range(0, len(examples), 1000), unit="k rows", leave=False, disable=None):
        rendered = []
        for example in examples[start:start + 1000]:
            parts = render(example.messages, tokenizer, example.context, flags.max_length)
            if isinstance(parts, str):
                notes[f"dropped: {parts}"] += 1
            else:
                rendered.append((example.id, parts))
        texts = [text for _, parts in rendered for text, _ in parts]
        tokens = iter(tokenizer(texts or [""], add_special_tokens=False).input_ids)
        for id, parts in rendered:
            parts = [(next(tokens), supervised) for _, supervised in parts]
            lengths = itertools.accumulate(len(ids) for ids, _ in parts)
            fits = sum(length <= flags.max_length for length in lengths) // 2 * 2  # whole turns
            if fits:
                rows.append(to_row(id, parts[:fits]))
            if fits < len(parts):
                notes["cut or dropped: longer than --max-length"] += 1
    return rows, notes

# ================================================ 8. large models: several GPUs, adapters, --resume

def rank():
    """Number of this process: torchrun starts one per GPU."""
    return dist.get_rank() if dist.is_initialized() else 0

def ranks():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1

def in_batches(work, sequences, flags, room=0):
    """Results of work(batch), a list per batch, for all sequences (Rows or lists of token ids), in
    order, on every rank. Batches hold similar lengths; each rank works on its share."""
    results = {}
    batches = list(micro_batches(sequences, flags.eval_batch_tokens, room))
    for indices, _ in tqdm(batches, leave=False, disable=None):
        results |= zip(indices, work([sequences[i] for i in indices]))
    if ranks() > 1:
        of_ranks = [None] * ranks()
        dist.all_gather_object(of_ranks, results)
        for found in of_ranks:
            results |= found
    return [results[i] for i in range(len(sequences))]

def shard(model, flags):
    """Spread weights, gradients and optimizer over the ranks with FSDP2, a decoder layer at a time:
    fp32 shards are the masters; a layer is gathered, in bf16 if asked for, while it computes."""
    from torch.distributed import device_mesh, fsdp
    mesh = device_mesh.init_device_mesh(flags.device.split(":")[0], (ranks(),))
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for module in [*layers, model]:
        fsdp.fully_shard(
            module, mesh=mesh, reshard_after_forward=True, mp_policy=fsdp.MixedPrecisionPolicy(
                torch.bfloat16 if flags.dtype == "bf16" else None, reduce_dtype=torch.float32))
    fsdp.register_fsdp_forward_method(model, "generate")  # or a PeftModel's gathers no shards

def add_lora(model, flags):
    """The model with fp32 adapters on its linear layers. They are evaluated beside the weights;
    --save-model merges them."""
    torch.manual_seed(flags.seed)
    with or_exit("--lora-rank: try without it, or pip install peft"):
        import peft
        adapted = peft.get_peft_model(model, peft.LoraConfig(  # all but what it cannot wrap
            r=flags.lora_rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM",
            exclude_modules=r".*\b(mamba|mixer|router|vision_tower|visual)\b.*"))
    adapted.print_trainable_parameters()
    return adapted

def write(path, save):
    """A file or folder, whole or not at all: save(new) makes it beside `path`; then it moves."""
    new = Path(f"{path}.new")
    with or_exit(f"{path}: cannot be written, is the disk full? What was there before is kept", 1):
        save(new)
        shutil.rmtree(path, ignore_errors=True)  # a folder cannot be replaced, a file can
        new.replace(path)

def write_lines(path, lines):
    """A JSONL file of dicts."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write(path, lambda new: new.write_bytes(text.encode()))

WHOLE = dict(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
def save_checkpoint(model, optimizer, state, folder):
    """Replace checkpoint.pt by the state, trained weights and optimizer, unsharded: any number of
    ranks can go on from it. The order of the rows and dropout follow from seed and step."""
    import torch.distributed.checkpoint.state_dict as dcp  # 0.5 s: only when needed
    weights = dcp.get_state_dict(model, optimizer, options=dcp.StateDictOptions(**WHOLE))
    write(folder / "checkpoint.pt", lambda new: torch.save([state, *weights], new))

def load_state(folder):
    """(state, weights, optimizer) that a run goes on from: those of checkpoint.pt, which only a
    folder of --resume has, else of step 0. The state is what the run adds to, evaluation by
    evaluation; known: ids by set, from the first one; dropped: the choice of filter."""
    saved = [{"step": 0, "log": {"loss": None}, "known": {},
              "history": [], "outcomes": [], "dropped": [], "run": None}, {}, {}]
    path = folder / "checkpoint.pt"
    if path.exists():
        with or_exit(f"{path}: is damaged; without it --resume starts anew"):
            require(not zipfile.ZipFile(path).testzip(), f"{path}: has a part with flipped bits")
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        print(f"{path}: going on after step {saved[0]['step']}")
    if ranks() > 1:  # rank 0 alone has the folder; restore() hands out the weights
        state = saved[:1]
        dist.broadcast_object_list(state)
        saved[:1] = state
    return saved

def restore(model, optimizer, saved):
    """Move a checkpoint's weights and optimizer out of `saved`, which would keep their memory, and
    in place, from rank 0 to all. (set_state_dict, which does both, hangs on several ranks.)"""
    import torch.distributed.checkpoint.state_dict as dcp
    how = dcp.StateDictOptions(**WHOLE, broadcast_from_rank0=ranks() > 1)
    dcp.set_model_state_dict(model, saved.pop(0), options=how)
    dcp.set_optimizer_state_dict(model, optimizer, saved.pop(0), options=how)

def save_model(model, tokenizer, folder, flags):
    """Write the finetuned model, adapters merged in, as `from_pretrained` reads it."""
    import torch.distributed.checkpoint.state_dict as dcp
    model = model.merge_and_unload() if flags.lora_rank else model
    how = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=how) if ranks() > 1 else None

    def save(new):
        model.save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)

    if rank() == 0:
        write(folder, save)

# ============================================================================== 9. report

HEAD = "  step set              loss context_acc parametric_acc closed_book_acc margin"

def table_row(line):
    """One row of the table that stands under HEAD."""
    line = line | {"set": line["set"][-14:], "loss": line["loss"] or math.nan}
    row = "{step:6} {set:14} {loss:7.3f} {context_acc:11.3f}"
    if "margin" in line:
        row += " {parametric_acc:14.3f} {closed_book_acc:15.3f} {margin:6.2f}"
    return row.format(**line)

def draw_curves(lines, labels, path):
    """Draw context_acc over the steps from a table of metrics, a curve for each value of columns
    `labels`; over several runs their mean, in a band of one standard deviation."""
    try:
        import matplotlib.figure
    except ImportError:
        return print(f"no {path.name}: pip install matplotlib")
    figure = matplotlib.figure.Figure(figsize=(5, 4))
    axes, groups = figure.subplots(), lines.groupby(labels)
    axes.set(xlabel="optimizer steps", ylabel="context_acc", ylim=(0, 1.1))
    axes.set_prop_cycle(color="#000000 #D55E00 #0072B2 #009E73 #CC79A7 #E69F00".split())  # Okabe
    for i, (label, group) in enumerate(groups, 1):
        acc = group.groupby("step")["context_acc"].agg(["mean", "std"]).fillna(0)
        curve, = axes.plot(acc["mean"])
        axes.fill_between(acc.index, acc["mean"] - acc["std"], acc["mean"] + acc["std"], alpha=0.15)
        place = acc.iloc[len(acc) * i // (len(groups) + 1)]  # labels stand at different steps
        axes.text(place.name, place["mean"] + 0.02, ", ".join(label).replace(", None", ""),
                  color=curve.get_color())
    write(path, lambda new: figure.savefig(new, dpi=200, format="png"))
    print(f"curves in {path}")

def rate(hits, n):
    """`hits` of `n` as text, with Wilson's 95% interval, which holds near 0 and 1, too."""
    share, w = hits / n, 1.96 ** 2 / n
    center = (share + w / 2) / (1 + w)
    reach = math.sqrt(w * (share * (1 - share) + w / 4)) / (1 + w)
    return f"{hits} of {n} = {share:.2f} [{center - reach:.2f}, {center + reach:.2f}]"

SAYS = {"context_acc": "gives the context's answer",
        "parametric_only": "gives only what it knew", "both": "gives both answers",
        "neither": "gives neither: if many, see the answers, the template, --max-new-tokens"}
def describe(name, item, table, tokenizer):
    """Print what a single evaluation of a set, its outcomes as a table, says about a model."""
    print(f"\n{name}, the prompt of one item as the model gets it:", tokenizer.decode(item.prompt),
          f"{name}, eight answers, then what the model does:", sep="\n")
    for outcome in table[:8].to_dict("records"):
        print(" ", *[cell for cell in CELLS if outcome.get(cell) is True],
              repr(outcome["text"][:60]))
    if "known" in table:
        facts, table = table["known"].count(), table[table["known"].eq(True)]
        print(f"  {rate(len(table), facts):34} knows it without its context; of these, with it:")
    for metric, says in SAYS.items():
        if metric in table and len(table):
            print(f"  {rate(table[metric].sum(), len(table)):34} {says}")

def report(state, sets, tokenizer, folder, flags):
    """Print the verdict on each set, or what its only evaluation says; write curve.png and, last,
    summary.json, which marks a run that has finished."""
    last, verdicts = {line["set"]: line for line in state["history"]}, {}
    for name, table in pandas.DataFrame(state["outcomes"]).groupby("set", sort=False):
        table = table.dropna(axis=1, how="all")  # columns of other sets
        verdicts[name] = summarise(table)
        if flags.max_steps == 0:
            describe(name, sets[name][0], table, tokenizer)
    if flags.max_steps != 0:
        print("\ncontext_acc; rise and drop are measured on items that did not choose the peak:",
              pandas.DataFrame(verdicts).to_string(float_format="{:.3f}".format), sep="\n")
        draw_curves(pandas.DataFrame(state["history"]), ["set"], folder / "curve.png")
    write_lines(folder / "summary.json", [
        {name: last[name] | verdict for name, verdict in verdicts.items()}])

def compare(flags):
    """Print a table of the runs of --compare, all seeds of a setting as one line, and draw it."""
    runs, lines = [], []
    for folder in map(Path, flags.compare):
        with or_exit(f"--compare {folder}: is no finished run"):
            args = json.loads((folder / "args.json").read_text())
            setting = {name: str(value) for name, value in args.items()
                       if name not in (*FREE, "seed", "eval_set", "mechanism")}
            lines.append(pandas.read_json(folder / "metrics.jsonl", lines=True).assign(**setting))
            runs.append(pandas.read_json(folder / "summary.json", orient="index").assign(**setting))
    runs = pandas.concat(runs)
    labels = [name for name in [*setting, "set"] if runs[name].nunique() > 1] or ["set"]
    columns = ["start", "peak", "final", "drop"]
    if runs["max_steps"].eq("0").all():  # only measured
        columns = ["closed_book_acc", "context_acc", "parametric_acc", "both", "neither", "margin"]
    groups = runs.reindex(columns=[*labels, *columns]).groupby(labels)
    table = groups.agg(["mean", "std"]).dropna(axis=1, how="all")
    table["n", ""] = groups.size()
    print(table.to_string(float_format="{:.2f}".format))
    draw_curves(pandas.concat(lines), labels, Path(flags.out_dir or folder.parent, "compare.png"))

# ========================================================================= 10. flags and main

FLAGS = [  # (flag, default, type or choices, help); a list as default takes several
    ("--model", "world", str, "hub id or folder; world: a toy, made on the spot (WORLD_FLAGS)"),
    ("--dataset", "alpaca", str, "rows: alpaca, tulu, ultrachat, squad, file, folder, hub id"),
    ("--eval-set", ["world_facts"], str, "world_facts, capitals, bio, quotes, nq_swap, squad, ..."),
    ("--template", "auto", ["auto", "tulu"], "auto: the tokenizer's, or tulu if it has none"),
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
    "dataset": "rows", "eval_set": ["world", "world_agreeing", "world_reading"],
    "counterfactual_data": "world_train", "lr": 1e-3, "batch_size": 64,
    "warmup_frac": 0.2, "max_steps": 480, "eval_every": 20, "max_new_tokens": 3, "mechanism": True}
FREE = ("resume", "checkpoint_every", "save_model", "out_dir", "device", "micro_batch_tokens",
        "eval_batch_tokens", "activation_checkpointing")  # may change on --resume

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
    if first.model == "world":
        parser.set_defaults(**WORLD_FLAGS)
    require(not first.lora_rank or first.mitigation != "qk", "--lora-rank does not go with qk")
    parser.set_defaults(mitigation_strength=STRENGTH.get(first.mitigation),
                        device=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flags = parser.parse_args(argv)
    for name, value in vars(flags).items():
        if type(value) in (int, float):
            least = int(type(value) is int and name not in ("max_steps", "seed", "lora_rank"))
            most = 1 if name == "mitigation_strength" else 1e12
            require(least <= value <= most, f"--{name.replace('_', '-')} {value}: must be between "
                    f"{least} and {most:g}")
    flags.dtype = flags.dtype or ("bf16" if "cuda" in flags.device else "fp32")
    return collections.namedtuple("Flags", vars(flags))(**vars(flags))

def load_pretrained(auto, source, **how):
    """What `auto` reads from a hub id or folder, without running any of its code."""
    with or_exit(f"--model {source}: cannot be loaded as a causal LM; pass a hub id or a local "
                 "folder with config.json, tokenizer and .safetensors"):
        return auto.from_pretrained(source, trust_remote_code=False, **how)

def load_model(source, config, tokenizer, flags):
    """The model with fp32 weights (bf16 where they are not trained and arithmetic is bf16), set to
    greedy answers that end where the template's turns end. Exits if it is no causal LM."""
    frozen = flags.max_steps == 0 or flags.lora_rank
    dtype = torch.bfloat16 if frozen and flags.dtype == "bf16" else torch.float32
    auto = transformers.AutoModelForCausalLM
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = transformers.AutoModelForImageTextToText  # answers text without an image, too
    model, info = load_pretrained(auto, source, dtype=dtype, use_safetensors=True,
                                  output_loading_info=True)
    if ranks() == 1:  # otherwise its shards go there
        model.to(flags.device)
    logits = model.eval()(torch.tensor([[1, 2], [1, 3]], device=model.device)).logits[:, 0]
    require(logits.isfinite().all(), f"--model {flags.model}: NaN among its weights or logits")
    causal = torch.allclose(*logits, atol=1e-3)  # a token does not see the next one
    require(causal and not info["missing_keys"], f"--model {flags.model} is no causal LM, or lacks "
            f"weights: {info['missing_keys']!r:.200}")
    own = model.generation_config.eos_token_id  # a token, several, or None
    turn = tokenize(question_and_answer("Hi", "Hello"), tokenizer)[-1][0]
    stops = {tokenizer.eos_token_id, turn[-1], *(own if isinstance(own, list) else [own])} - {None}
    model.generation_config = transformers.GenerationConfig(  # greedy: nothing is inherited
        eos_token_id=sorted(stops), pad_token_id=tokenizer.eos_token_id)
    return model

def load_data(source, config, positions, flags):
    """(tokenizer, {name: Items}, Examples) of a run; exits on what cannot work."""
    tokenizer = load_pretrained(transformers.AutoTokenizer, source)
    require(tokenizer.eos_token and len(tokenizer) <= config.get_text_config().vocab_size,
            f"--model {flags.model}: its tokenizer has no EOS token, or more tokens than the model")
    examples = load_examples(flags) if flags.max_steps != 0 else []
    set_template(tokenizer, flags)
    sets = {}
    for name in flags.eval_set:
        conflicts = draw(load_conflicts(name, flags), flags.eval_limit, seed=0)
        items = [to_item(conflict, tokenizer) for conflict in conflicts]
        sets[name] = [
            item for item in items if len(item.prompt) + flags.max_new_tokens <= positions]
        print(f"{name}: {len(sets[name])} of {len(items)} items fit into the model's positions")
        require(sets[name], f"{name}: no usable evaluation item")
    return tokenizer, sets, examples

def check_padding(model, flags):
    """The flags, with answers one by one if the model sees left padding, as rwkv does: then nine
    tokens of padding change its logits after nine others by more than bf16 would round them."""
    logits = []
    for padding in (0, 9):
        ids = torch.arange(-padding, 9, device=model.device)[None]  # below 0: padding
        out = model.generate(
            input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), max_new_tokens=1,
            output_logits=True, return_dict_in_generate=True)
        logits.append(out.logits[0].float())
    if torch.corrcoef(torch.cat(logits))[0, 1] > 0.998:
        return flags
    print("answers change in padded batches of this model, so it answers one by one")
    return flags._replace(eval_batch_tokens=1)

@contextlib.contextmanager
def open_folder(flags):
    """The folder of this run, for it alone while it lasts: OUT_DIR, or OUT_DIR-2, -3, ... where
    that is taken; with --resume the first of them that holds a checkpoint."""
    first = flags.out_dir or f"runs/{flags.mitigation}"
    for i in itertools.count(1):
        folder = Path(f"{first}-{i}" if i > 1 else first)
        if flags.resume and (folder / "checkpoint.pt").exists():
            break
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    with or_exit(f"--resume {folder}: another run is writing there; wait for its end"):
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    with lock:  # gone when this process ends, however it does
        yield folder

def experiment(flags):
    """One run: data, model, choice of rows, training with evaluation, report."""
    source = world_model(flags) if flags.model == "world" else flags.model
    config = load_pretrained(transformers.AutoConfig, source)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    flags = flags._replace(max_length=min(flags.max_length, positions))
    tokenizer, sets, examples = load_data(source, config, positions, flags)
    model = load_model(source, config, tokenizer, flags)
    flags = check_padding(model, flags)
    byte_sums = [p.detach().flatten().view(torch.uint8).sum().item() for p in model.parameters()]
    probe = probe_rows(model, tokenizer, examples, flags) if flags.mechanism else {}
    rows, total = [], 0
    if flags.mitigation == "qk":
        train_query_key_only(model)
    if flags.lora_rank:
        model = add_lora(model, flags)
    if flags.activation_checkpointing:
        with or_exit("--activation-checkpointing: run without it"):
            model.gradient_checkpointing_enable()
    if ranks() > 1:
        shard(model, flags)
    with open_folder(flags) as folder:
        state, *saved = load_state(folder)
        if examples:
            examples = choose_examples(model, tokenizer, examples, sets, state, flags)
            rows, notes = encode(examples, tokenizer, flags)
            require(rows, f"{flags.dataset}: no usable row, chats mark no context: {notes}")
            del examples  # their texts take as much memory as the rows
            print(f"{flags.dataset}: {len(rows)} rows", dict(notes))
            total = math.ceil(flags.epochs * math.ceil(len(rows) / flags.batch_size))
            total = min(total, flags.max_steps or total)
        # what a run that is resumed must have in common with the one that it goes on from
        run = repr([flags._replace(**dict.fromkeys(FREE)), byte_sums, sets,
                    [(row.id, row.targets, row.input_ids.sum()) for row in rows]])
        run = hashlib.sha256(run.encode()).hexdigest()
        require(state["run"] in (None, run), f"--resume {folder}: that run had other flags (see "
                "its args.json), another model, or other rows or items; take another --out-dir")
        state["run"] = run
        write_lines(folder / "args.json", [flags._asdict()])
        print(f"{model.num_parameters()} weights, {total} steps, files in {folder}\n\n{HEAD}")
        train(model, tokenizer, rows, sets, probe, total, state, saved, folder, flags)
        report(state, sets, tokenizer, folder, flags)
        if flags.save_model:
            save_model(model, tokenizer, folder / "model", flags)
    return state["history"]

def main(argv=None):
    """Do what the flags say; of a run, return the history: the lines of metrics.jsonl as dicts."""
    flags = parse_flags(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if flags.compare:
        return compare(flags)
    if dist.is_torchelastic_launched() and not dist.is_initialized():  # by torchrun
        if flags.device == "cuda":
            torch.cuda.set_device(dist.get_node_local_rank())
        dist.init_process_group()  # gloo on a CPU, NCCL on GPUs
    with or_exit(f"--device {flags.device}: cannot be used; leave it out for the best there is"):
        torch.ones(1, device=flags.device).item()
    if rank() == 0:
        require(ranks() == 1 or flags.model != "world" and not flags.mechanism,
                "the world and --mechanism run in one process, without torchrun")
        return experiment(flags)
    with (tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere,
          contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere)):
        return experiment(flags._replace(out_dir=f"{folder}/run"))  # as rank 0 does, but unseen

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter costs no run
    try:
        main()
    except KeyboardInterrupt:
        require(False, "interrupted; the evaluations so far are in the run's folder", 130)
    except torch.OutOfMemoryError:
        require(False, "out of memory: lower --micro-batch-tokens and --eval-batch-tokens, or pass "
                "--activation-checkpointing; all of them may change on --resume", status=1)
    except OSError as error:
        require(False, str(error), status=1)
