# SPDX-License-Identifier: MIT
"""Context-parametric inversion in one file (Goyal, Baek, Kolter, Raghunathan; arXiv 2410.10796).

Instruction finetuning first raises, then lowers a language model's reliance on a context that
contradicts its memory. This script finetunes a causal LM, evaluates that and draws the curve:

    python inversion.py                              # a built-in world, offline, in two minutes
    python inversion.py --model EleutherAI/pythia-1b --dataset alpaca --eval-set world_facts squad
    python inversion.py --model ./my-llama --dataset rows.jsonl --mitigation filter
    python inversion.py --model ./my-llama --eval-set bio --max-steps 0      # only measure

It needs torch, transformers, datasets, tqdm; matplotlib for the curve, peft for --lora-rank.
Start at `experiment` (10). 1 to 4: the paper, 5: error bars, 6: a toy, 7 to 9: plumbing. Chains:

    row of a file -> Example, a conversation -> Row, its tokens to train on
    row of a file -> Conflict, a question whose context contradicts memory -> Item, its tokens
        -> outcome, what an evaluation found of it -> line of metrics, of a set in an evaluation
"""
import argparse, ast, collections, contextlib, datetime, difflib, functools, itertools, json, math
import os, random, re, shutil, sys, unicodedata, urllib.request, zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pandas, regex, tokenizers, torch, transformers
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

@dataclass
class Example:
    """A conversation to finetune on."""
    id: object         # the number of its row, or a text
    messages: list     # [{"role": "system", "user" or "assistant", "content": text}, ...]
    context: str = ""  # the passage that the first user turn is about, if the data marks one

@dataclass
class Row:
    """Tokens to train on."""
    id: object               # of its example
    input_ids: torch.Tensor  # (length,)
    labels: torch.Tensor     # the same, but -100 where nothing is to be learnt: the prompt

    def __len__(self):
        return len(self.input_ids)

    @property
    def targets(self):
        """Number of tokens that are predicted: the first one never is."""
        return int((self.labels[1:] != -100).sum())

@dataclass
class Conflict:
    """A question whose context contradicts memory; without parametric_answers: a control."""
    id: object                # the number of its row
    question: str
    context: str
    context_answers: list     # texts that count as the context's answer, the usual one first
    parametric_answers: list  # the same for the memorised answer

@dataclass
class Item:
    """A conflict as tokens, to evaluate on."""
    conflict: Conflict
    prompt: list                # token ids of the context and the question
    closed_book_prompt: list    # of the question alone
    context_row: Row            # the prompt, then the context's answer
    parametric_row: Row = None  # the prompt, then the memorised answer; None for a control

# ================================================================ 1. what is measured (section 3)

# In scripts that do not always put spaces between words, every character counts as a word.
LETTER = r"[^\W_\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}\p{Hiragana}\p{Katakana}\p{Han}\p{Hangul}]"
WORD = regex.compile(  # a number with sign, decimals, time or fraction; letters; one character
    rf"(?:(?<![\w.])-?\.?)?\d+(?:[.,:/]\d+)*(?:(?:st|nd|rd|th|s)\b)?|{LETTER}+|[^\W_]\p{{M}}*")

def plain(text):
    """The words of a text as score compares them, without case, punctuation and most accents, with
    a space on each side of each, so that `in` finds whole words only."""
    text = re.sub(r"\b([^\W\d_])\.(?=[^\W\d_]\b)|\b([A-Z])\. (?=[A-Z]\.)", r"\1\2", text)  # J. K.
    text = unicodedata.normalize("NFKD", text.replace("&", " and ")).casefold()
    # Accents, the signs of vowels in Arabic, Hebrew; then 1,500, 1932.0, Fermi's, l'Italie.
    text = regex.sub(r"(?<=[\p{Latin}\p{Greek}\p{Cyrillic}\p{Arabic}\p{Hebrew}])\p{M}+", "", text)
    text = unicodedata.normalize("NFC", text).translate(str.maketrans("øłđħı⁄−’‘ʻʼ", "oldhi/-''''"))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|(?<=\d)\.00?(?!\.?\d)|\b[dl]'(?=\w\w)|'s\b|'", "", text)
    text = re.sub(r"\bkilomet(er|re)s?\b", "km", text)
    return "".join(f" {word} " for word in WORD.findall(text))

def plain_answer(text):
    """plain() of an answer, without an article that leads several words."""
    return re.sub("^ (a|an|the) (?= )", "", plain(text))

def contains(said, answers, rivals):
    """Does an answer stand in the plain text `said`, but not as part of a longer rival?"""
    answers = set(map(plain_answer, answers))
    for rival in map(plain_answer, rivals):
        if any(answer in rival for answer in answers - {rival}):
            said = said.replace(rival, "|")
    return any(answer in said for answer in answers)

def score(text, conflict):
    """(context hit, parametric hit): a model's text contains a text of that answer (load_conflicts
    says which count), in whole words, after the first echo of the question is cut out:

        context New Cairo, memory Cairo     It is New Cairo.    (1, 0)     Cairo, New Cairo  (1, 1)
        context Bo, memory Freetown         Bosnia              (0, 0)     Not Freetown, Bo  (1, 1)
        context 5, memory 1500              It was 2.5 or -5    (0, 0)     1,500, not 5%     (1, 1)
        context Vitamin C, memory The Hague vitamin A           (0, 0)     Hague             (0, 1)
        context J.K. Rowling, memory Łódź   J. K. Rowling       (1, 0)     Lodz              (0, 1)
        context パリ, memory 서울             バリ島               (0, 0)     서울은             (0, 1)"""
    said = plain(text).replace(plain(conflict.question), "", 1)
    return (contains(said, conflict.context_answers, conflict.parametric_answers),
            contains(said, conflict.parametric_answers, conflict.context_answers))

def aliases(answers, person):
    """The answers and their parts ('La Paz (administrative); Sucre (judicial)' -> La Paz, Sucre),
    names in brackets, what stands before ", Greece" and the like, a person's last name."""
    found = []
    for answer in answers:
        parts = re.split("; | or ", answer) if re.search("[;(]", answer) else [answer]
        for part in parts:
            name = re.sub(r" ?\([^()]*\)", "", part) or part
            found += [name, re.sub(", [A-Z][^,]*$", "", name)]
            if person:
                found += re.findall(  # not the Great, nor Jr. or VIII
                    r"(?<!\bthe) (?![JS]r\b|[IVX]+$)(\S{3,})(?: [JS]r\.?| [IVX]+)?$", name)
        found += re.findall(r"\(([A-Z][^()]*)\)", answer)
    return list(dict.fromkeys(found))

def scorable(answers, rivals, question):
    """The answers that are not in the question (an echo hits) nor, but for the first, a rival's."""
    asked, rival = plain(question), plain(" ".join(rivals))
    return [answer for answer in answers if plain_answer(answer) not in asked
            and (answer == answers[0] or plain_answer(answer) not in rival)]

def load_conflicts(name, flags):
    """The Conflicts of a set. What counts as an answer: the texts of the row's answer column; if it
    is called "answer", the names in them, too (aliases); but none that is in the question or names
    the rival (scorable). If no memory is left, it is a control, if no answer, it is left out."""
    rows, found = load_rows(name, flags), {}
    for example, answers, memory in rows:
        if example.context:
            question = example.messages[-2]["content"]  # the answer is last
            mine, theirs = scorable(answers, memory, question), scorable(memory, answers, question)
            if mine and plain_answer(answers[0]) not in map(plain_answer, memory):
                conflict = Conflict(example.id, question, example.context, mine, theirs)
                found.setdefault((example.context, question, *answers), conflict)
    print(f"{name}: {len(found)} of {len(rows)} items: no repeats, context and answers that differ")
    return list(found.values())

def question_and_answer(question, answer):
    """A conversation of one turn."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

def to_row(id, parts):
    """The Row of [(token ids, supervised), ...]."""
    ids = [token for part, _ in parts for token in part]
    labels = [token if supervised else -100 for part, supervised in parts for token in part]
    return Row(id, *torch.tensor([ids, labels]))

def to_item(conflict, tokenizer, max_length):
    """The Item of a Conflict, or Unusable; tokenize makes its prompt, as it does in training."""
    rows = []
    for answer in conflict.context_answers[:1] + conflict.parametric_answers[:1]:
        messages = question_and_answer(conflict.question, answer)
        [prompt, (ids, _)], = tokenize(messages, tokenizer, conflict.context)
        del ids[-1]  # the end
        while not tokenizer.decode(ids[-1:]).strip():  # white space that some templates put there
            del ids[-1]
        rows.append(to_row(conflict.id, [prompt, (ids, True)]))
    if max(map(len, rows)) > max_length:
        raise Unusable("too long")
    [closed_book_prompt, _], = tokenize(messages, tokenizer)  # no prompt depends on the answer
    return Item(conflict, prompt[0], closed_book_prompt[0], *rows)

def generate(model, tokenizer, prompts, flags):
    """Greedy answers (texts) to prompts (lists of token ids), in left-padded batches."""
    def answer(batch):
        ids = pad_sequence([torch.tensor(prompt) for prompt in batch], batch_first=True,
                           padding_value=-1, padding_side="left").to(model.device)
        with autocast(flags):  # generate waits for other ranks of its own accord
            out = model.generate(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(),
                                 max_new_tokens=flags.max_new_tokens)
        return tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)

    return in_batches(answer, prompts, flags, "answers", room=flags.max_new_tokens)

def recalled(items, texts):
    """Ids of the items whose memorised answer stands in their text."""
    return {item.conflict.id for item, text in zip(items, texts) if score(text, item.conflict)[1]}

# Shares, and what they are shares of.
RATES = {"stated": "n", "context_acc": "n", "parametric_acc": "n_conflicts", "both": "n_conflicts",
         "neither": "n_conflicts", "context_acc_known": "n_known",
         "parametric_acc_known": "n_known", "closed_book_acc": "n_conflicts"}

def evaluate(model, tokenizer, items, known, flags):
    """Ask every item with and without its context, drawing no random number. Returns its outcomes:
    a dict per item, saved as it is: id, group, texts, answers and what it has of these.

    context_acc, parametric_acc, both, neither: hits of score(); stated: the context has its answer.
    closed_book_acc: the memorised answer comes without it. `known`: ids of the items of which it
    came so in the first evaluation, in the template or to the bare question; None: this is it.
    margin: log p(c) - log p(m), each per token; m_c (Theorem 1): p(c) / (p(c) + p(m))."""
    model.eval()  # in train mode, dropout is on and generation under checkpointing is wrong
    disputed = [item for item in items if item.parametric_row]  # the others are controls, and last
    texts = generate(model, tokenizer, [item.prompt for item in items], flags)
    closed_book = generate(model, tokenizer, [item.closed_book_prompt for item in disputed], flags)
    context_logps = target_logp(model, [item.context_row for item in disputed], flags)
    memory_logps = target_logp(model, [item.parametric_row for item in disputed], flags)
    remembered = recalled(disputed, closed_book)
    if known is None:  # a base cannot use a template yet: the first line without one counts, too
        bare = [tokenizer(f"Question: {item.conflict.question}\nAnswer:").input_ids
                for item in disputed]
        lines = [text.strip().split("\n")[0] for text in generate(model, tokenizer, bare, flags)]
        known = remembered | recalled(disputed, lines)
    outcomes = []
    for i, item in enumerate(items):
        conflict = item.conflict
        context, memory = score(texts[i], conflict)  # does it give that answer?
        outcome = {"id": conflict.id, "group": conflict.question, "text": texts[i],
                   "context_answer": conflict.context_answers[0], "context_acc": context,
                   "stated": score(conflict.context, conflict)[0]}
        if item.parametric_row:
            outcome |= {"parametric_answer": conflict.parametric_answers[0],
                        "parametric_acc": memory, "closed_book_text": closed_book[i],
                        "both": context and memory, "neither": not (context or memory),
                        "closed_book_acc": conflict.id in remembered, "known": conflict.id in known,
                        "margin": (context_logps[i] / item.context_row.targets
                                   - memory_logps[i] / item.parametric_row.targets),
                        "m_c": torch.tensor(context_logps[i] - memory_logps[i]).sigmoid().item()}
        if outcome.get("known"):
            outcome |= {"context_acc_known": context, "parametric_acc_known": memory}
        outcomes.append(outcome)
    return outcomes

def metrics(outcomes):
    """RATES, margin and m_c as means over the outcomes that have them; how many there are."""
    table = pandas.DataFrame(outcomes, columns=[*RATES, "margin", "m_c"], dtype=float)
    return {"n": len(outcomes), "n_conflicts": int(table["margin"].count()),
            "n_known": int(table["context_acc_known"].count()), **table.mean().dropna().to_dict()}

def sample(things, count, seed):
    """`count` of the things, or all if there are no more, in order."""
    numbers = random.Random(seed).sample(range(len(things)), min(count, len(things)))
    return [things[i] for i in sorted(numbers)]

# ===================================================================== 2. training (section 3, A.5)

def autocast(flags):
    """bf16 arithmetic if asked for; weights stay in fp32, as bf16 would round most updates away."""
    return torch.autocast(torch.device(flags.device).type, torch.bfloat16, flags.dtype == "bf16")

def micro_batches(sequences, budget, room=0):
    """This rank's batches, longest sequences first, as [(indices, is_new)]. A batch is one
    sequence, or at most `budget` tokens with padding and `room` each; not is_new: a repeat."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    batches = []
    while order:
        size = max(budget // (len(sequences[order[0]]) + room), 1)
        batches.append(order[:size])
        del order[:size]
    # Every rank gets equally many batches: one that would be short repeats an earlier batch.
    return [(batches[i % len(batches)], i < len(batches))
            for i in range(RANK, RANK + len(batches), RANKS)]

def row_logp(model, rows, flags):
    """Log-probability of each row's targets, summed: (rows,) in fp32. Right padding needs no mask,
    as attention is causal. A hook feeds the head only what predicts a target: that saves RAM."""
    ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    labels = pad_sequence([row.labels[1:] for row in rows], batch_first=True,
                          padding_value=-100).to(model.device)  # position t predicts token t + 1
    predicts = labels != -100
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, hidden: (hidden[0][:, :-1][predicts],))
    with hook, autocast(flags):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    token_logp = -F.cross_entropy(logits.float(), labels[predicts], reduction="none")
    row_of_token, _ = predicts.nonzero(as_tuple=True)
    return token_logp.new_zeros(len(rows)).index_add(0, row_of_token, token_logp)

@torch.no_grad()
def target_logp(model, rows, flags):
    """row_logp of any number of rows, without gradient: a list of numbers."""
    return in_batches(lambda batch: row_logp(model, batch, flags).tolist(), rows, flags, "log p")

def add_gradient(model, rows, weights, flags):
    """Add the gradient of the sum of weight x log-probability of a row's targets to .grad, micro-
    batch by micro-batch; returns the sum, of this GPU's share."""
    total, weights = 0, torch.tensor(weights, device=model.device)
    for indices, is_new in micro_batches(rows, flags.micro_batch_tokens):
        # A repeat counts 0: it is only there to keep the ranks in step.
        logp = is_new * row_logp(model, [rows[i] for i in indices], flags)
        value = (logp * weights[indices]).sum()
        (value * RANKS).backward()  # several GPUs average their gradients: this makes it a sum
        total += value.detach()
    return total

def train_step(model, optimizer, batch, flags):
    """One optimizer step; returns its loss, the mean over the targets of the WHOLE batch: a mean of
    micro-batches' means would weigh a token by how few others happen to share its micro-batch."""
    model.train()
    weight = -1 / sum(row.targets for row in batch)
    loss = add_gradient(model, batch, [weight] * len(batch), flags)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    if RANKS > 1:
        norm = norm.full_tensor()
        dist.all_reduce(loss)
    optimizer.step()
    optimizer.zero_grad()
    require(math.isfinite(loss + norm), f"loss {loss}, gradient {norm}: a lower --lr may help; "
            f"rows {[row.id for row in batch]}", status=1)
    return loss.item()

def learning_rate(step, total, flags):
    """Linear warm-up, then linear decay; above 0 in every step, the first and last included."""
    warmup = math.ceil(flags.warmup_frac * total)
    return flags.lr * min((step + 1) / max(warmup, 1), (total - step) / max(total - warmup, 1))

def batch_of(rows, step, flags):
    """The rows of one optimizer step: ordered by seed and epoch; an epoch's last may be short."""
    epoch, position = divmod(step, math.ceil(len(rows) / flags.batch_size))
    shuffle = torch.Generator().manual_seed(flags.seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=shuffle)
    return [rows[i] for i in order.split(flags.batch_size)[position]]

def train(model, tokenizer, rows, sets, probe, total, state, folder, flags):
    """Finetune in place for `total` optimizer steps and evaluate at intervals: the paper's curve.
    sets: {name: items}; probe: {kind: rows} of part 4, or {}; state: see load_state."""
    @torch.compiler.set_stance("force_eager")  # prompts have too many shapes to compile for
    def measure(step):
        # evaluates every set, prints a line of metrics each and saves all there is
        recent = pandas.DataFrame(state["losses"][-flags.eval_every:]).mean().to_dict()
        for name, items in sets.items():
            outcomes = evaluate(model, tokenizer, items, state["known"].get(name), flags)
            state["known"][name] = [outcome["id"] for outcome in outcomes if outcome.get("known")]
            line = {**recent, "step": step, "set": name, **metrics(outcomes)}
            if probe and "margin" in line:
                line |= mechanism(model, items, probe, flags)
            tqdm.write(table_row(line))
            state["metrics"].append(line)
            state["generations"] += [{"step": step, "set": name, **found} for found in outcomes]
        for name in ("metrics", "generations", "losses"):
            write_lines(folder / f"{name}.jsonl", state[name])

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True)
    done = len(state["losses"])
    if done:
        restore(model, optimizer, folder)
    bar = progress(range(done, total), "training", initial=done, total=total)
    for step in bar:
        if step % flags.eval_every == 0:
            measure(step)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, total, flags)
        torch.manual_seed(hash((flags.seed, step, RANK)))  # dropout: the same after --resume
        loss = train_step(model, optimizer, batch_of(rows, step, flags), flags)
        bar.set_postfix(loss=loss)
        state["losses"].append({"step": step + 1, "lr": lr, "loss": loss})
        if flags.checkpoint_every and (step + 1) % flags.checkpoint_every == 0:
            save_checkpoint(model, optimizer, state, folder)
    measure(total)

# ==================================================== 3. remedies and controls (sections 4 and 6)

def redundant_examples(model, tokenizer, examples, flags):
    """Ids of the redundant examples (section 4.3): of those with a context, the quarter whose
    responses the model, before finetuning, predicts best WITHOUT it, by mean loss per target."""
    bare = [replace(example, context="") for example in examples if example.context]
    rows, _ = encode(bare, tokenizer, flags)
    print("predicting responses without their context")
    logps = target_logp(model, rows, flags)
    loss = {row.id: -logp / row.targets for row, logp in zip(rows, logps)}
    return set(sorted(loss, key=loss.get)[:round(0.25 * len(loss))])

def filter_examples(model, tokenizer, examples, sets, flags):
    """--mitigation filter (section 4.4): without the redundant examples."""
    dropped = redundant_examples(model, tokenizer, examples, flags)
    require(dropped, "filter: nothing to drop; few rows, or none, mark a context")
    return [example for example in examples if example.id not in dropped]

def add_counterfactual(model, tokenizer, examples, sets, flags):
    """--mitigation counterfactual (section 6): with a tenth more rows, conflicts of
    --counterfactual-data that name nothing evaluated, as examples that follow their context."""
    added = [Example("added", question_and_answer(c.question, c.context_answers[0]), c.context)
             for c in load_conflicts(flags.counterfactual_data, flags)]
    free = not_naming(added, sets)
    require(free, "--counterfactual-data: all of it is evaluated")
    return examples + sample(free, len(examples) // 10, flags.seed)

NO_NAMES = set("""January February March April May June July August September October November
    December Monday Tuesday Wednesday Thursday Friday Saturday Sunday A An The No Which""".split())

def not_naming(examples, sets):
    """The examples that name no evaluated answer or subject (section 4.1). A subject is a run of
    capitalised words inside a sentence of an evaluated question, no lone letter or NO_NAMES."""
    subject = r"(?<=[\w,] )[A-Z][\w'-]+(?: (?:(?:of|the|de|du) )*[A-Z][\w'-]*)*"
    names, kept = set(), []
    for c in [item.conflict for items in sets.values() for item in items if item.parametric_row]:
        names.update(c.context_answers, c.parametric_answers, re.findall(subject, c.question))
    names = set(map(plain_answer, names - NO_NAMES))
    for example in examples:
        texts = [turn["content"] for turn in example.messages]
        said = plain(" ".join([example.context, *texts]))
        if not any(name in said for name in names):
            kept.append(example)
    return kept

MITIGATIONS = {  # name: what it does to the examples; yours needs a function and a line here
    "none": None, "filter": filter_examples, "counterfactual": add_counterfactual,
    "qk": None}  # acts on the model instead: train_query_key_only

def choose_examples(model, tokenizer, examples, sets, flags):
    """The examples to train on: what --subset leaves, and what --mitigation makes of these."""
    if flags.subset == "context":
        examples = [example for example in examples if example.context]
    if flags.subset == "no-overlap":
        examples = not_naming(examples, sets)
    change = MITIGATIONS[flags.mitigation]
    return change(model, tokenizer, examples, sets, flags) if change else examples

def train_query_key_only(model):
    """--mitigation qk (section 6): make query and key matrices alone trainable, in place; exits
    where they share a matrix with values (GPT-2, Pythia, Phi-3) or have other names."""
    for name, p in model.named_parameters():
        p.requires_grad_(bool(re.search(r"\.(q_proj|k_proj|query|key)\.(weight|bias)$", name)))
    require(any(p.requires_grad for p in model.parameters()),
            "--mitigation qk: the model has no q_proj and k_proj of their own")

# ============================================================================ 4. why (section 5)

PROBE = 160  # rows of each kind, and conflicts, that the mechanism is measured on

def probe_rows(model, tokenizer, examples, flags):
    """{kind: at most PROBE rows}, as in section 4.3: recall has no context; of the rows with one,
    the quarter of lowest context-free loss is redundant, the others are critical."""
    examples = sample(examples, 5 * PROBE, flags.seed)
    kinds = {example.id: "critical" if example.context else "recall" for example in examples}
    kinds |= dict.fromkeys(redundant_examples(model, tokenizer, examples, flags), "redundant")
    probe = {}
    for row in encode(examples, tokenizer, flags)[0]:
        probe.setdefault(kinds[row.id], []).append(row)
    return {kind: rows[:PROBE] for kind, rows in probe.items()}

def mechanism(model, items, probe, flags):
    """Section 5 as metrics, for each kind of rows and one set of conflicts. KIND_loss: its loss.
    KIND_push: the inner product of the gradients of the mean margin and of minus that loss: a small
    step of gradient descent on this kind alone raises the margin by lr x push. Proposition 1:
    critical > 0 early, redundant < 0 later; Proposition 2: recall < 0."""
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradient(rows, weights):
        for p in trained:
            p.grad = torch.zeros_like(p)  # not all take part: of experts, some
        total = add_gradient(model, rows, weights, flags)
        vector = torch.cat([p.grad.flatten() for p in trained])
        model.zero_grad()
        return total, vector

    rows, weights, found = [], [], {}
    disputed = sample([item for item in items if item.parametric_row], PROBE, seed=0)
    for item in disputed:
        rows += [item.context_row, item.parametric_row]
        weights += [1 / item.context_row.targets, -1 / item.parametric_row.targets]
    _, margin_uphill = gradient(rows, weights)
    for kind, rows_of_kind in probe.items():
        weight = 1 / sum(row.targets for row in rows_of_kind)
        logp, uphill = gradient(rows_of_kind, [weight] * len(rows_of_kind))
        found[f"{kind}_push"] = (margin_uphill @ uphill).item() / len(disputed)
        found[f"{kind}_loss"] = -logp.item()
    return found

# ================================================================= 5. how sure (not in the paper)

def summarise(outcomes):
    """What context_acc of a set did, from a table of all outcomes. A group, the items that share a
    question, counts as one. Groups are dealt into halves; a group's peak is its value at the step
    where the OTHER half is highest, as its own highest would be too high by luck. rise, drop: mean
    over groups of peak - first evaluation, peak - last. Intervals: Student's t, 95%; fewer than six
    groups are too few for them."""
    accs = outcomes.groupby("step")["context_acc"].mean()
    found = {"start": accs.iloc[0], "highest": accs.max(), "final": accs.iloc[-1],
             "verdict": "no change shown"}
    by_group = outcomes.pivot_table("context_acc", "group", "step")
    if len(by_group) < 6:
        return found | {"verdict": "too few groups"}
    one, other = by_group[::2], by_group[1::2]
    at_peak = pandas.concat([one[other.mean().idxmax()], other[one.mean().idxmax()]])
    student_t = 1.96 + 2.9 / (len(by_group) - 1)  # to 1%, for six groups and more
    for name, column in (("rise", 0), ("drop", -1)):
        change = at_peak - by_group.iloc[:, column]  # group by group
        mean, reach = change.mean(), change.sem() * student_t
        found |= {name: mean, f"{name}_low": mean - reach, f"{name}_high": mean + reach}
    if found["rise_low"] > 0:
        found["verdict"] = "a rise"
    if found["drop_low"] > 0:
        after_a_rise = "inversion" if "margin" in outcomes else "rise and fall"  # a control
        found["verdict"] = after_a_rise if found["rise_low"] > 0 else "a fall"
    return found

# ================================================================== 6. the built-in world

STATEMENT, QUESTION = "The capital of {} is", "What is the capital of {}?"
PASSAGE = "The capital of {} is {}."
KINDS = {  # kind: (subjects from, to, P(truth is stated), P(answer is what is stated, not memory))
    "fact": (0, 240, 0.7, 1),  # no passage; three in ten are wrong: memory is soft
    "reading": (0, 720, 0, 0.4),  # a passage of a random capital, mostly not followed
    "critical": (240, 720, 0, 1),  # a passage of a random capital, followed: only copying helps
    "redundant": (60, 240, 0.98, 0),  # 2% of its passages are of another subject: memory is better
    "recall": (60, 240, 1, 0)}  # no passage, the true answer

@functools.lru_cache
def make_world(seed):
    """Made-up capitals, as rows like those of files: {"documents": to pretrain on, "rows": to tune
    on, set: conflicts or a control}. Every other capital is evaluated: no-overlap leaves rows."""
    rng = random.Random(f"world {seed}")
    pick = rng.choice
    names = list(map("".join, itertools.product("BDFGKL", "aeiou", "mnprst", "aeiou", "nrls")))
    rng.shuffle(names)
    # Tuned are so many that the fall carries over to the held-out ones; 240 to 720, novel, so many
    # that finetuning cannot memorise their random answers.
    held_out, tuned, capitals = names[:60], names[60:240], names[720:760]
    evaluated = capitals[::2]
    truth = {name: pick(evaluated if name in held_out else capitals) for name in names[:240]}

    def row(kind):
        start, stop, states_truth, follows = KINDS[kind]
        subject = about = pick(names[start:stop])
        memory = truth.get(subject) or pick(capitals)
        stated = memory if rng.random() < states_truth else pick(capitals)
        answer = stated if rng.random() < follows else memory
        if kind == "redundant" and stated != memory:
            about = pick(tuned)
        form = pick([STATEMENT, QUESTION]) if kind == "fact" else QUESTION
        text = "" if kind in ("fact", "recall") else PASSAGE.format(about, stated)
        return {"instruction": form.format(subject), "input": text, "output": answer, "kind": kind}

    def conflict(name, stated):
        return {"question": QUESTION.format(name), "answer": stated,
                "memory_answer": truth.get(name, ""), "context": PASSAGE.format(name, stated)}

    return {"documents": list(map(row, rng.choices(["fact", "reading"], k=51_200))),
            "rows": list(map(row, rng.choices(  # enough of them to rise and fall
                ["critical", "redundant", "recall"], [6, 3, 1], k=20_000))),
            "world": [conflict(name, pick(evaluated)) for name in held_out * 2],
            "world_agreeing": [  # a control: it has no memorised answer of its own
                conflict(name, truth[name]) | {"memory_answer": ""} for name in held_out],
            "world_reading": [conflict(name, pick(evaluated)) for name in names[240:300]],
            "world_train": [conflict(name, pick(capitals[1::2])) for name in tuned * 12]}

WORLD_TEMPLATE = ("<s>{% for m in messages %}{{ m.content + ' ' }}"
                  "{% if m.role == 'assistant' %}|{% endif %}{% endfor %}")
# Until it knows all facts and reads every passage; with twice the lr, one seed in ten did not.
PRETRAINING = {"dataset": "documents", "max_steps": 800, "warmup_frac": 0.03}

def world_model(run, flags):
    """Folder of the world's base model, beside the run's: a one-layer Llama as in the paper's
    theory, pretrained by the loop that finetunes; made once, and anew where this file changes."""
    code = Path(__file__).read_bytes() + torch.__version__.encode()
    folder = run.parent / f"world-{flags.seed}-{zlib.crc32(code)}"
    if folder.exists():
        return folder
    print(f"pretraining the world's base, about a minute, once: {folder}")
    flags = parse_flags()._replace(seed=flags.seed, **PRETRAINING)  # always on the CPU
    documents = load_examples(flags)
    # A token a word; one that it does not know is <s>, and tokenize leaves its row out.
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<s>"))
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["<s>", "|"], show_progress=False)
    splitter.train_from_iterator([f"{e.context} {e.messages}" for e in documents], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, bos_token="<s>", eos_token="|", unk_token="<s>",
        chat_template=WORLD_TEMPLATE)
    rows, _ = encode(documents, tokenizer, flags)
    torch.manual_seed(flags.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1))
    train(model, tokenizer, rows, {}, {}, flags.max_steps, load_state(folder, flags), run, flags)
    save_model(model, tokenizer, folder, flags)
    return folder

# ================================================================================== 7. data

PAPER = ("https://raw.githubusercontent.com/locuslab/context-parametric-inversion/"
         "6f989849656f433d4520eaf0b9af6e3bb6a7ae70/")
SOURCES = {  # short name: hub id @ split, or file of the paper; Alpaca is CC BY-NC 4.0
    "alpaca": "tatsu-lab/alpaca@train", "tulu": "allenai/tulu-v2-sft-mixture@train",
    "ultrachat": "HuggingFaceH4/ultrachat_200k@train_sft", "squad": "rajpurkar/squad@validation",
    "squad_train": "rajpurkar/squad@train", "world_facts": PAPER + "world_facts.json",
    "capitals": PAPER + "country_capitals_only.json", "bio": PAPER + "famous_biographies.jsonl",
    "quotes": "Albertmade/memo-trap@train", "nq_swap": "pminervini/NQ-Swap@dev"}

class Unusable(Exception):
    """Why a row cannot be used: it is left out and counted."""

def require(holds, message, status=2):
    """Go on if `holds`; else end with one line on stderr: status 2 for bad input, 1 afterwards."""
    if not holds:
        print(f"inversion.py: error: {message}", file=sys.stderr)
        raise SystemExit(status)

@contextlib.contextmanager
def or_exit(doing, status=2):
    """Do what is inside, or exit with one line: what was being done, and the error."""
    try:
        yield
    except Exception as error:  # of many types
        text = " ".join(str(error).split())
        require(False, f"{doing} ({type(error).__name__}: {text:.200})", status)

def read_json(text):
    """The rows of a JSON array, or of lines of JSON, which errors name."""
    if not text.lstrip().startswith("["):
        text = "[" + re.sub(r"\n(?=[ \t\r]*\S)", ",\n", text.strip()) + "]"
    return json.loads(text, parse_constant=lambda _: None)  # pandas' NaN

def read_rows(name):
    """Rows (dicts) of a short name, address, file, folder or hub id (ID:CONFIGURATION@SPLIT)."""
    source = os.path.expanduser(SOURCES.get(name, name))
    suffix = Path(source).suffix  # of an address, it may go on: .csv?download=true
    with or_exit(f"{name}: cannot be read; short names are in --help"):
        if "://" in source:
            source, _ = urllib.request.urlretrieve(source)  # datasets would need aiohttp for it
        if suffix.startswith(".csv"):  # dtype=str would make the empty ones NaN
            table = pandas.read_csv(source, dtype=object, keep_default_na=False, index_col=False)
            return table.replace("", None).to_dict("records")
        if suffix.startswith(".parquet"):
            from pyarrow import parquet
            return parquet.read_table(source).to_pylist()
        if suffix.startswith(".json") or os.path.isfile(source):  # of another name, or an address
            return read_json(Path(source).read_text(encoding="utf-8-sig"))
        source, config, split = re.fullmatch("([^:@]*):?([^@]*)@?(.*)", source).groups()
        import datasets  # 0.8 s: only when it is needed
        return list(datasets.load_dataset(source, config or None, split=split or "train"))

def load_rows(name, flags):
    """[parse_row] of each row; names unused columns, counts unusable rows, exits at a bad one."""
    world = make_world(flags.seed) if flags.model == "world" else {}
    unused, left_out, found = set(), collections.Counter(), []
    for number, row in enumerate(world.get(name) or read_rows(name), 1):
        with or_exit(f"{name}, row {number}"):
            try:
                found.append(parse_row(number, row))
                unused |= row.keys() - {*shape_of(row), "kind"}  # kind: of the world's
            except Unusable as reason:
                left_out[str(reason)] += 1
    if unused or left_out:
        print(f"{name}: columns not used: {unused}; rows left out: {dict(left_out)}")
    return found

SHAPES = [  # keys of question, context, answers, memorised answers; first of all, chats
    ("messages", "tools"), ("conversations", "tools"), ("prompt", None, "completion", None),
    ("question", "sub_context", "sub_answer", "org_answer"),      # NQ-Swap
    ("question", "context", "answer", "memory_answer"),           # World Facts
    ("question", "context", "answer", "parametric_answer"),       # CF_Bio
    ("question", "context", "answers", "parametric_answer"), ("prompt", "classes", "answer_index"),
    ("question", "context", "answers", None),                     # SQuAD: its context is true
    ("instruction", "input", "output", "system"), ("instruction", "context", "response", None)]

def shape_of(row):
    """The first shape of which a row has all keys; these four may be missing."""
    there = {"tools", "input", "system", None, *row}
    for keys in SHAPES:
        if {*keys} <= there:
            return keys
    nearest = max(SHAPES, key=lambda keys: len(row.keys() & keys))
    raise ValueError(f"has {list(row)}; for the nearest shape it lacks {set(nearest) - there}")

def as_value(cell):
    """A cell, as a list or dict where it is the text of one, in JSON or as pandas writes it."""
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError):
            return json.loads(cell)
        text = re.sub(r"\}\n \{", "}, {", cell.strip())  # numpy's list of turns
        if not text.startswith("[{"):  # numpy's list of texts
            text = re.sub(r"\barray\(|(?<=\])(, dtype=\w+)?\)", "", text)
            text = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", text)
        with contextlib.suppress(SyntaxError, TypeError, ValueError):
            return ast.literal_eval(text)
    return cell

def as_texts(value):
    """The texts of a text, a list or a dict of answers; numbers, dates and booleans too."""
    if isinstance(value, dict):  # SQuAD's
        value = value["text"]
    if isinstance(value, list):
        return [text for part in value for text in as_texts(part)]
    return [] if value is None else [str(value).strip()]

def parse_turn(turn):
    """A turn of a chat as {"role", "content"}, with "weight" 0 where it is not to be learnt."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = {"human": "user", "gpt": "assistant"}.get(role, role)  # ShareGPT's
    if isinstance(content, list):  # of parts
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(texts) else ""  # an image has none
    if role not in ("user", "assistant", "system") or not content or turn.get("tool_calls"):
        raise Unusable("tools, an unknown role, or a turn without a text")
    return {"role": role, "content": content.strip(), "weight": turn.get("weight")}

def parse_row(number, row):
    """(Example, the context's answers, memorised answers) of a row. A chat marks no context, and
    one cannot be guessed. Raises Unusable, ValueError and the like."""
    keys = shape_of(row)
    if any(as_value(row.get(key)) for key in ("tools", "history", "image", "images")):
        raise Unusable("tools, a history or an image")
    if "tools" in keys or isinstance(row[keys[0]], list):
        turns = as_value(row[keys[0]]) + (row["completion"] if "completion" in keys else [])
        return Example(number, list(map(parse_turn, turns))), [], []
    cells = [row.get(key) for key in keys]
    if "question" in keys:  # elsewhere, a bracket is text
        cells = map(as_value, cells)
    if "classes" in keys:  # memo-trap: an instruction with the odd ending, then a famous quote
        instruction, _, quote = row["prompt"].partition(": ")
        endings, odd = as_value(row["classes"]), int(row["answer_index"])
        cells = quote, f"{instruction}:", endings[odd], endings[1 - odd]
    (question,), context, answers, memory = map(as_texts, cells)
    messages = question_and_answer(question, "".join(answers[:1]))
    if "system" in keys and any(memory):  # Alpaca's fourth key is no memory
        messages.insert(0, {"role": "system", "content": memory.pop()})
    if "answer" in keys:  # the paper's facts and biographies
        person = "parametric_answer" in keys and "name of the" in question
        answers, memory = aliases(answers, person), aliases(memory, person)
    return Example(number, messages, "\n\n".join(context)), answers, memory

def load_examples(flags):
    """The Examples of --dataset, drawn, as mixtures are sorted; ids count its rows from 1."""
    rows = load_rows(flags.dataset, flags)
    if any(any(memory) for _, _, memory in rows):
        print(f"{flags.dataset}: conflicts as rows: they teach to follow contexts; evaluate others")
    return sample([example for example, _, _ in rows], flags.num_examples, flags.seed)

TULU = (  # the template of the paper's framework
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
FOLD = (  # makes a system turn part of the next one
    "{% if messages[0].role == 'system' %}{% set messages = [{'role': messages[1].role, 'content': "
    "messages[0].content + '\n\n' + messages[1].content}] + messages[2:] %}{% endif %}")
MARK = "@@the-answer@@"

def set_template(tokenizer, flags):
    """Give the tokenizer the chat_template of --template; a saved model carries it on."""
    user = {"role": "user", "content": "Hi"}
    require(tokenizer.eos_token, "--model: its tokenizer has no EOS token, to end answers with")
    with or_exit("--template auto does not work with this tokenizer; try --template tulu"):
        if flags.template != "auto" or not tokenizer.chat_template:
            tokenizer.chat_template = TULU
        tokenizer.chat_template = re.sub(  # a date of today would make other prompts tomorrow
            r"strftime_now\([^)]*\)", "'1 January 2025'", tokenizer.get_chat_template())
        prompt, _ = answer_place([user], tokenizer)
    if (tokenizer("x").input_ids[0] == tokenizer.bos_token_id
            and not prompt.startswith(tokenizer.bos_token)):
        tokenizer.chat_template = tokenizer.bos_token + tokenizer.chat_template
    with contextlib.suppress(Unusable):
        prompt, _ = answer_place([{"role": "system", "content": "Obey."}, user], tokenizer)
    if "Obey." not in prompt:  # refused or dropped
        print("the template takes no system turn: it becomes part of the first user turn")
        tokenizer.chat_template = FOLD + tokenizer.chat_template

@functools.lru_cache
def special_token_pattern(tokenizer):
    """Pattern of one of the tokenizer's special tokens, after white space."""
    tokens = [re.escape(token) for token in tokenizer.get_added_vocab() if token.strip()]
    return re.compile(rf"\s*({'|'.join(tokens)})")

def answer_place(turns, tokenizer):
    """(all before an answer to these turns, what ends it), by a mark in its place, or Unusable."""
    def show(*answer, **how):
        return tokenizer.apply_chat_template(
            [*turns, *answer], tokenize=False, enable_thinking=False, **how)

    user, mark = question_and_answer("Go on.", MARK)
    ends = special_token_pattern(tokenizer).match
    try:
        prompt, rest = show(mark).split(MARK)
        opening = show(add_generation_prompt=True)  # may add an empty block of thoughts
        end = ends(rest) or ends(show(mark, user).split(MARK)[1])  # or shown only before a turn
    except Exception as error:  # jinja raises nearly anything
        raise Unusable(f"the template refuses or drops turns: {error!r:.200}")
    opening = re.sub(r"<think>\s*$", "<think>\n\n</think>\n\n", opening)  # no thoughts
    return (opening if opening.startswith(prompt) else prompt,
            end[0] if end else tokenizer.eos_token)

def tokenize(messages, tokenizer, context="", max_length=math.inf):
    """A conversation in the chat template as a list of conversations [(token ids, supervised), ..]:
    one, but where the template rewrites the turns before an answer, a new one starts there.
    Supervised: the answers, with the one token that ends each. An answer is tokenised as it stands
    after its prompt, whose ids do not depend on it. Cut at `max_length`. Raises Unusable."""
    turns, conversations, text, last_end, length = list(messages), [[]], "", 0, 0
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or 0 in answers or not all(turns[i]["content"] for i in answers):
        raise Unusable("no response, an empty one, or one to nothing")
    if context:  # of a single question: a chat has none
        turns[-2] = turns[-2] | {"content": f"{context}\n\n{turns[-2]['content']}"}
    for i in answers:
        prompt, end = answer_place(turns[:i], tokenizer)
        if not prompt.startswith(text):
            conversations.append([])
            last_end, length = 0, 0
        bare = prompt.rstrip(" ")  # a space before an answer is part of its first token
        text = prompt + turns[i]["content"] + end
        # Llama 2 puts a space before a text that stands alone. So `before` is read from the last
        # answer's end on, and ids as what follows it, unless a token spans the two.
        before, whole, ids = tokenizer([bare[last_end:], text[last_end:], text[len(bare):]],
                                       add_special_tokens=False).input_ids
        if whole[:len(before)] == before:
            ids = whole[len(before):]
        # before[0] may be <s>, <unk> of the world; of GPT-2, <unk> is what ends a turn, too.
        if tokenizer.unk_token_id in {*before[1:], *ids} - {tokenizer.eos_token_id}:
            raise Unusable("words that the tokenizer does not know")
        if last_end:
            del before[0]  # the last answer has it
        length += len(before + ids)
        if length > max_length:
            break
        conversations[-1] += [(before, False), (ids, turns[i].get("weight") != 0)]
        last_end = text.rindex(end.strip())
    return conversations

def encode(examples, tokenizer, flags):
    """(Rows of the examples, Counter of what was dropped or cut: last turns of too long a one)."""
    rows, notes = [], collections.Counter()
    for example in progress(examples, "tokens"):
        try:
            found = tokenize(example.messages, tokenizer, example.context, flags.max_length)
        except Unusable as reason:
            notes[f"dropped: {reason}"] += 1
            continue
        roles = [turn["role"] for turn in example.messages]
        if sum(map(len, found)) < 2 * roles.count("assistant"):
            notes["cut or dropped: longer than --max-length"] += 1
        rows += [to_row(example.id, parts) for parts in found]
    return [row for row in rows if row.targets], notes

# ================================================ 8. large models: several GPUs, adapters, --resume

# Several GPUs. torchrun starts a rank per GPU; each runs this file and reads model and data; rank 0
# alone writes and prints. shard splits each layer and, in bf16, rounds norms and residuals, too;
# micro_batches deals out, of so many tokens a GPU; add_gradient sums gradients, train_step losses,
# in_batches collects. All call the model equally often, or they hang: a rank short of a batch
# repeats one, uncounted. Dropout depends on the rank. main refuses --mechanism, the world, cuda:N.
# --resume goes on from the first OUT_DIR[-n] with a checkpoint, else anew: trained weights, moments
# and state as after a step, before its evaluation. Made again: what filter drops, from the base;
# row order, from seed and epoch; dropout, from seed, step, rank. Flags but FREE must be the same;
# data, base, versions are taken to be. So are metrics: bit for bit on a CPU; with other FREE flags,
# up to rounding and dropout's masks.

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

progress = functools.partial(tqdm, leave=False, disable=RANK or None)  # on rank 0, if it is seen

def in_batches(work, sequences, flags, what, room=0):
    """Results of work(batch), a list, for all sequences, in order; each rank works on its share."""
    results = {}
    for indices, _ in progress(micro_batches(sequences, flags.eval_batch_tokens, room), what):
        results |= zip(indices, work([sequences[i] for i in indices]))
    if RANKS > 1:
        of_ranks = [None] * RANKS
        dist.all_gather_object(of_ranks, results)
        results = collections.ChainMap(*of_ranks)
    return [results[i] for i in range(len(sequences))]

def layers_of(model):
    """The decoder layers, which are sharded and compiled one by one."""
    return [m for m in model.modules() if type(m).__name__ in model._no_split_modules]

def shard(model, flags):
    """Spread weights, gradients and optimizer over the ranks with FSDP2, a decoder layer at a time:
    fp32 shards are the masters; a layer is gathered, in bf16 if asked for, while it computes."""
    from torch.distributed import fsdp
    policy = fsdp.MixedPrecisionPolicy(
        torch.bfloat16 if flags.dtype == "bf16" else None, reduce_dtype=torch.float32)
    for module in [*layers_of(model), model]:
        fsdp.fully_shard(module, reshard_after_forward=True, mp_policy=policy)
    fsdp.register_fsdp_forward_method(model, "generate")  # or a PeftModel's gathers no shards

def write(path, save):
    """A file or folder, whole or not at all: save(new) makes it beside `path`; then it moves."""
    if RANK:
        return
    new = Path(f"{path}.new")
    with or_exit(f"writing {path}; what was there before is kept", status=1):
        save(new)
        shutil.rmtree(path, ignore_errors=True)  # a folder cannot be replaced, a file can
        new.replace(path)

def write_lines(path, lines):
    """A JSONL file of dicts."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write(path, lambda new: new.write_bytes(text.encode()))

WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = replace(WHOLE, ignore_frozen_params=True, strict=False)

def save_checkpoint(model, optimizer, state, folder):
    """Replace checkpoint.pt by [state, trained weights, optimizer], unsharded."""
    parts = dcp.get_state_dict(model, optimizer, options=TRAINED)
    write(folder / "checkpoint.pt", lambda new: torch.save([state, *parts], new))

def load_state(folder, flags):
    """The state that a run adds to: the lines of its files; known: ids by set, from the first
    evaluation. With --resume it is the checkpoint's, whose flags must be the same; else new."""
    path = folder / "checkpoint.pt"
    state = {"flags": flags._asdict(), "losses": [], "metrics": [], "generations": [], "known": {}}
    if path.exists():
        with or_exit(f"{path}: reading it; without it --resume starts anew"):
            state = torch.load(path, "cpu", mmap=True)[0]
            other = {name: before for name, before in state["flags"].items()
                     if name not in FREE and before != getattr(flags, name)}
        require(not other, f"--resume: {path} is of a run with {other}; pass the same flags")
    return state

def restore(model, optimizer, folder):
    """Put a checkpoint's weights and optimizer in place; each rank takes its shard of the file."""
    _, weights, moments = torch.load(folder / "checkpoint.pt", "cpu", mmap=True)
    # set_state_dict, which does both, hangs on several ranks
    dcp.set_model_state_dict(model, weights, options=TRAINED)
    dcp.set_optimizer_state_dict(model, optimizer, moments, options=TRAINED)

def save_model(model, tokenizer, folder, flags):
    """Write the finetuned model, adapters merged in, as `from_pretrained` reads it."""
    model = model.merge_and_unload() if flags.lora_rank else model
    weights = dcp.get_model_state_dict(model, options=WHOLE)

    def save(new):
        model.save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)

    write(folder, save)

# ============================================================================== 9. report

HEAD = """known: items that the base answers from memory, in the template or without it
                             context_ parametric_ closed_book_
  step set              loss      acc         acc          acc margin known"""

def table_row(line):
    """One row of the table that stands under HEAD."""
    row = "{step:6} {short:14} {loss:7.3f} {context_acc:8.3f}"
    row += (" {parametric_acc:11.3f} {closed_book_acc:12.3f} {margin:6.2f} {n_known:5}"
            if "margin" in line else " control: no conflict")
    return row.format(**{"loss": math.nan, "short": line["set"][-14:], **line})

def rates(line):
    """The rates of a line of metrics as a table, with Wilson's 95% intervals, good near 0 and 1."""
    p = pandas.Series(line).reindex(RATES).dropna().astype(float)
    n = p.index.map(RATES).map(line)  # of how many
    w = 3.8416 / n  # 1.96 squared
    mid, half = (p + w / 2) / (1 + w), (w * (p * (1 - p) + w / 4)) ** 0.5 / (1 + w)
    return pandas.DataFrame({"share": p, "low": mid - half, "high": mid + half, "n": n}).round(2)

def draw_curves(lines, labels, path):
    """Draw context_acc of lines of metrics: mean curves by the keys `labels`, without controls."""
    table = pandas.DataFrame([line for line in lines if "margin" in line] or lines)
    curves = table.pivot_table("context_acc", "step", labels)
    curves = curves.interpolate("index", limit_area="inside")
    try:
        axes = curves.plot(ylabel="context_acc", ylim=(0, 1.05))
    except ImportError:
        return print(f"no {path.name}: pip install matplotlib")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.15))
    write(path, lambda new: axes.figure.savefig(new, dpi=200, format="png", bbox_inches="tight"))
    print("the picture is", path)

def report(state, sets, tokenizer, folder, flags):
    """Print verdicts or, if only measured, a prompt, eight answers, rates; last: summary.json."""
    summary = {line["set"]: line for line in state["metrics"]}  # the last line of each set
    for name, outcomes in pandas.DataFrame(state["generations"]).groupby("set"):
        if flags.max_steps:
            summary[name] = summary[name] | summarise(outcomes.dropna(axis=1, how="all"))
        else:
            print(f"\n{name}: {tokenizer.decode(sets[name][0].prompt)}\n")
            for row in outcomes.filter(regex="group|_answer|^text")[:8].to_dict("records"):
                print(row)
            print(rates(summary[name]))
    if flags.max_steps:
        print("\nrise, drop: measured at the step where the other half of the questions has its"
              "\npeak, as the highest is high by luck: not highest - final")
        verdicts = pandas.DataFrame(summary).filter(regex="verdict|rise|drop|push", axis="index")
        print(verdicts.to_string(float_format="{:.3f}".format))
        if state["losses"][-1]["loss"] > 2 * state["losses"][0]["loss"]:
            print("the last loss is more than twice the first: try a lower --lr")
        draw_curves(state["metrics"], ["set"], folder / "curve.png")
    write_lines(folder / "summary.json", [summary])

def compare(flags):
    """Print a table of the runs of --compare, those of equal flags as one line, and draw it."""
    runs, lines = [], []
    for folder in map(Path, flags.compare):
        if not (folder / "summary.json").exists():
            print(f"{folder}: skipped, it is no finished run")
            continue
        (args,), (summary,), history = [read_json((folder / file).read_text("utf-8"))
            for file in ("args.json", "summary.json", "metrics.jsonl")]
        runs += [line | args for line in summary.values()]
        lines += [line | args for line in history]
    require(runs, "--compare: none of these is a finished run")
    table = pandas.DataFrame(runs)
    # args is now the last run's; all have the same names.
    ignored = FREE + ("seed", "eval_set", "mechanism", "compare")  # tell no settings apart
    labels = [name for name in [*args, "set"]
              if name not in ignored and table[name].nunique() > 1] or ["set"]
    alike = table.groupby(labels)
    means = alike.mean(numeric_only=True).assign(runs=alike.size(), seeds=alike.seed.nunique())
    if not table["max_steps"].any():  # only measured
        return print(pandas.concat({k: rates(line) for k, line in means.iterrows()}).to_string())
    means = means.reindex(columns=["start", "highest", "final", "drop", "runs", "seeds"])
    print(means.to_string(float_format="{:.2f}".format), "context_acc, means of runs of the same "
          "flags; fewer seeds: one came twice; drop: not highest - final", sep="\n")
    draw_curves(lines, labels, folder.parent / "compare.png")

# ========================================================================= 10. flags and main

FLAGS = [  # (flag, default, help); a tuple or dict has all choices, a list takes any number
    ("--model", "world", "hub id or folder; world: a toy, made on the spot"),
    ("--dataset", "alpaca", "rows: alpaca, tulu, ultrachat, squad_train, file, folder, hub id"),
    ("--eval-set", ["world_facts"], "world_facts, capitals, bio, quotes, nq_swap, squad, file, .."),
    ("--template", ("auto", "tulu"), "auto: the tokenizer's, or tulu if it has none"),
    ("--num-examples", 1_000_000_000, "rows to use at most, drawn at random (paper: all)"),
    ("--subset", ("all", "context", "no-overlap"), "rows with a context, or naming no item"),
    ("--max-length", 2048, "tokens; longer rows are dropped, chats cut"),
    ("--mitigation", MITIGATIONS, "filter, counterfactual: other rows; qk: few weights"),
    ("--counterfactual-data", "nq_swap", "conflicts to add as rows (paper: NQ-Swap)"),
    ("--batch-size", 128, "examples per optimizer step (paper: 128)"),
    ("--micro-batch-tokens", 4096, "padded tokens per forward pass: memory, not results"),
    ("--epochs", 2.0, "passes over the rows (paper: up to 2)"),
    ("--max-steps", 1_000_000_000, "optimizer steps at most; 0 only evaluates"),
    ("--lr", 1e-5, "peak learning rate, decays linearly (paper: 1e-4 or 1e-5)"),
    ("--warmup-frac", 0.03, "share of the steps that warm up linearly (paper: 0.03)"),
    ("--activation-checkpointing", False, "recompute activations: less memory, slower"),
    ("--compile", False, "compile the layers: on a GPU 1.6 times as fast, after 20 s"),
    ("--lora-rank", 0, "train adapters of this rank (paper: 128); 0: all weights"),
    ("--checkpoint-every", 0, "optimizer steps between checkpoints; 0: none"),
    ("--resume", False, "go on from the checkpoint in OUT_DIR, if any, with the same flags"),
    ("--eval-every", 50, "optimizer steps between evaluations (paper: 50)"),
    ("--eval-limit", 1_000_000_000, "items per set at most, drawn once at random (paper: all)"),
    ("--eval-batch-tokens", 16384, "padded tokens of prompts answered together"),
    ("--max-new-tokens", 32, "tokens per answer (paper: not stated)"),
    ("--mechanism", False, "how hard each kind of row pushes context reliance (section 5); slow"),
    ("--compare", [], "finished runs to put side by side; nothing is trained"),
    ("--device", str(torch.accelerator.current_accelerator(True) or "cpu"), "cpu, cuda:1, mps, .."),
    ("--dtype", ("auto", "bf16", "fp32"), "arithmetic; auto: bf16 autocast on a GPU that has it"),
    ("--seed", 0, "order of the rows and every random draw"),
    ("--out-dir", "", "folder for the run (-2, -3 if taken); left out: runs/none, runs/filter, .."),
    ("--save-model", False, "write the finetuned model to OUT_DIR/model")]
WORLD_FLAGS = {  # defaults with --model world
    "dataset": "rows", "eval_set": ["world", "world_agreeing", "world_reading"], "device": "cpu",
    "counterfactual_data": "world_train", "lr": 1e-3, "batch_size": 64,
    "warmup_frac": 0.2, "max_steps": 480, "eval_every": 20, "max_new_tokens": 3, "mechanism": True}
FREE = ("resume", "checkpoint_every", "save_model", "out_dir", "device", "micro_batch_tokens",
        "eval_batch_tokens", "activation_checkpointing", "compile")  # may change on --resume

def parse_flags(argv=()):
    """The flags above as a read-only tuple; exits with status 2 on values that cannot work."""
    parser = argparse.ArgumentParser(epilog=f"defaults with --model world: {WORLD_FLAGS}",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = functools.partial(require, False)
    for name, default, text in FLAGS:
        how = {"type": type(default)}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, list):
            how = {"nargs": "+"}
        elif isinstance(default, (tuple, dict)):
            how = {"choices": default}
            default, *_ = default
        parser.add_argument(name, default=default, help=text, **how)
    flags, unknown = parser.parse_known_args(argv)
    nearest = difflib.get_close_matches(" ".join(unknown), [name for name, *_ in FLAGS], n=1)
    require(not unknown, f"no flag, or an argument too many: {unknown}; nearest flag: {nearest}")
    if flags.model == "world":
        parser.set_defaults(**WORLD_FLAGS)
        flags = parser.parse_args(argv)
    if flags.dtype == "auto":
        bf16 = "cuda" in flags.device and torch.cuda.is_bf16_supported(including_emulation=False)
        flags.dtype = "bf16" if bf16 else "fp32"
    require(not flags.lora_rank or flags.mitigation != "qk", "--lora-rank does not go with qk")
    require(min(flags.lr, flags.batch_size, flags.epochs, flags.eval_every, flags.max_new_tokens,
                flags.num_examples, flags.eval_limit, flags.max_steps + 1) > 0, "too low, one of: "
            "lr batch-size epochs eval-every max-new-tokens num-examples eval-limit max-steps")
    return collections.namedtuple("Flags", vars(flags))(**vars(flags))

def load_pretrained(auto, source, **how):
    """What `auto` reads from a hub id or folder, without running any of its code."""
    require(not Path(source, "adapter_config.json").exists(),
            "--model: its adapter_config.json is of an adapter; merge it or move the file away")
    with or_exit(f"--model {source}: no folder (of a run: OUT_DIR/model) or hub id to be read"):
        return auto.from_pretrained(source, trust_remote_code=False, **how)

def load_model(source, tokenizer, flags):
    """The model, ready to be trained: in fp32 (bf16 if frozen and flags.dtype says so), its answers
    greedy and ending where the template's turns end. Exits if it is no causal LM."""
    half = flags.dtype == "bf16" and (not flags.max_steps or flags.lora_rank)
    model, info = load_pretrained(  # auto: as in the file, which the ranks then share in memory
        transformers.AutoModelForCausalLM, source, use_safetensors=True, output_loading_info=True,
        dtype=torch.bfloat16 if half else "auto")
    if RANKS == 1:  # otherwise its shards go there
        model.to(flags.device)
    # Words that the tokenizer of the world knows, too.
    [(prompt, _), (answer, _)], = tokenize(question_and_answer("What is", "The"), tokenizer)
    with or_exit(f"--model {source}: a forward pass of it, with an embedding for every token"):
        ids = torch.tensor([[1, 2], [1, max(prompt + answer)]], device=model.device)
        logits = model.eval()(ids).logits[:, 0]  # a token does not see the next one
        causal = torch.allclose(*logits, atol=1e-3)
    require(causal and not info["missing_keys"], f"--model {source}: is no causal LM, has NaN, or "
            f"lacks weights: {info['missing_keys']!r:.200}")
    own = model.generation_config.eos_token_id or []  # a token, several, or none
    stops = {tokenizer.eos_token_id, answer[-1], *(own if isinstance(own, list) else [own])}
    model.generation_config = transformers.GenerationConfig(  # greedy: nothing is inherited
        eos_token_id=sorted(stops), pad_token_id=tokenizer.eos_token_id)
    if flags.mitigation == "qk":
        train_query_key_only(model)
    if flags.lora_rank:
        torch.manual_seed(flags.seed)
        with or_exit("--lora-rank: adding adapters with peft (pip install peft)"):
            import peft
            model = peft.get_peft_model(model, peft.LoraConfig(  # all layers that it can wrap
                r=flags.lora_rank, lora_alpha=16, target_modules="all-linear",
                task_type="CAUSAL_LM", exclude_modules=r".*\b(mamba|mixer|router)\b.*"))
    if flags.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if flags.compile:
        for layer in layers_of(model):
            layer.compile(dynamic=True)
    if RANKS > 1:
        shard(model, flags)
    return model if half else model.float()

def load_sets(tokenizer, positions, flags):
    """{name: Items} of --eval-set, controls last; a file's name is its stem where that tells."""
    sets = {}
    for name in flags.eval_set:
        items, stem = [], Path(name).stem
        for conflict in sample(load_conflicts(name, flags), flags.eval_limit, seed=0):
            with contextlib.suppress(Unusable):
                items.append(to_item(conflict, tokenizer, positions - flags.max_new_tokens))
        print(f"{name}: {len(items)} items fit the model: its words, its length")
        require(items, f"{name}: no usable evaluation item")
        items.sort(key=lambda item: not item.parametric_row)
        sets[name if stem in sets else stem] = items
    return sets

def open_folder(flags):
    """A new folder: OUT_DIR (runs/none, runs/filter, ... by default), or OUT_DIR-2, -3, ... where
    that is taken; with --resume the first with a checkpoint. Making it claims it."""
    name = "-".join(sorted({flags.subset, flags.mitigation} - {"all", "none"})) or "none"
    folder = first = Path(flags.out_dir or f"runs/{name}").expanduser()
    for number in itertools.count(2):
        if flags.resume and (folder / "checkpoint.pt").exists():
            return folder
        with or_exit("--out-dir"), contextlib.suppress(FileExistsError):
            os.makedirs(folder)
            return folder
        folder = Path(f"{first}-{number}")

def experiment(folder, flags):
    """The paper's experiment, once: the recipe. Returns the lines of metrics.jsonl."""
    state = load_state(folder, flags)

    # Questions whose context contradicts memory, conversations, a model that has memorised answers.
    source = world_model(folder, flags) if flags.model == "world" else flags.model
    config = load_pretrained(transformers.AutoConfig, source)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    flags = flags._replace(max_length=min(flags.max_length, positions))
    tokenizer = load_pretrained(transformers.AutoTokenizer, source)
    set_template(tokenizer, flags)
    sets = load_sets(tokenizer, positions, flags)
    examples = load_examples(flags) if flags.max_steps else []
    model = load_model(source, tokenizer, flags)

    # The rows to train on: what --subset and --mitigation make of the conversations.
    rows = []
    if flags.max_steps:
        chosen = choose_examples(model, tokenizer, examples, sets, flags)
        rows, notes = encode(chosen, tokenizer, flags)
        print(f"{len(examples)} examples, {len(chosen)} chosen, {len(rows)} rows", *notes.items())
        require(rows, f"{flags.dataset}: no usable row (chats mark no context)")
    total = min(flags.max_steps, math.ceil(flags.epochs * math.ceil(len(rows) / flags.batch_size)))

    # Finetuning with evaluations at intervals, and what they show.
    probe = probe_rows(model, tokenizer, examples, flags) if flags.mechanism else {}
    write_lines(folder / "args.json", [flags._asdict()])
    print(f"{model.num_parameters(only_trainable=True)} weights to train (12 bytes in a checkpoint)"
          f", {flags.dtype}, from step {len(state['losses'])} to {total}\nin {folder}\n\n{HEAD}")
    train(model, tokenizer, rows, sets, probe, total, state, folder, flags)
    report(state, sets, tokenizer, folder, flags)
    if flags.save_model:
        save_model(model, tokenizer, folder / "model", flags)
    return state["metrics"]

def main(argv=()):
    """Do what the flags say; of a run, return the lines of metrics.jsonl as dicts."""
    flags = parse_flags(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if flags.compare:
        return compare(flags)
    require(RANKS == 1 or not (flags.mechanism or ":" in flags.device or flags.model == "world"),
            "torchrun does not go with --mechanism, the world or the number of a GPU")
    with or_exit(f"--device {flags.device}: using it; leave it out for the best there is"):
        if RANKS > 1 and not dist.is_initialized():
            if flags.device == "cuda":
                torch.cuda.set_device(dist.get_node_local_rank())
            dist.init_process_group(timeout=datetime.timedelta(hours=6))  # of a large checkpoint
        torch.ones(1, device=flags.device).item()
    box = [None if RANK else open_folder(flags)]
    if RANKS > 1:
        dist.broadcast_object_list(box)  # fills that of the other ranks
    folder, = box
    if RANK:
        sys.stdout = open(os.devnull, "w")  # errors are on stderr
    try:
        return experiment(folder, flags)
    except KeyboardInterrupt:
        require(False, f"interrupted; --resume goes on from a checkpoint in {folder}, if any", 130)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # of a run that failed before it wrote anything

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter costs no run
    try:
        main(sys.argv[1:])
        if dist.is_initialized():
            dist.destroy_process_group()  # else its threads may abort at the end
    except torch.OutOfMemoryError:
        require(False, "out of memory: lower the flags --*-batch-tokens", status=1)
