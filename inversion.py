# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.0", "datasets>=4.0", "tqdm>=4.60"]
# ///
"""Context-parametric inversion in one file (Goyal, Baek, Kolter, Raghunathan; arXiv 2410.10796).

Instruction finetuning first raises and then lowers how much a language model relies on its input
context when that context contradicts what it memorised in pretraining. This script finetunes a
causal LM, asks it questions with counterfactual contexts every few steps, and draws the curve:

    python inversion.py                              # a built-in world, offline, in two minutes
    python inversion.py --model EleutherAI/pythia-1b --dataset alpaca --eval-set world_facts squad
    python inversion.py --model ./my-llama --dataset rows.jsonl --mitigation filter
    python inversion.py --model ./my-llama --eval-set bio --max-steps 0      # only measure
    python inversion.py --model ./my-llama --dataset tulu --dry-run          # look, then stop
    python inversion.py --compare runs/none runs/filter                      # one table, one figure

Read it top to bottom: flags, data, the world, mitigations, evaluation, statistics, mechanism,
training, large models, report, main. Two plain records carry everything, whatever the source:
    example   {id, context, instruction, response} (single turn) or {id, messages} (chat)
    conflict  {id, context, question, context_answers, parametric_answers, group}
"""
import argparse
import ast
import collections
import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import unicodedata
from pathlib import Path

import jinja2
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

# --------------------------------------------------------------------------------------- flags
FLAGS = [  # (flag, default, type or choices, help); a list as default takes several; text: a group
    "what runs",
    ("--model", "world", str, "hub id or folder (paper: Llama-2-7B, Mistral-7B, Pythia-6.9B); "
     "world: a tiny one, pretrained on the spot, with defaults of its own (WORLD_FLAGS)"),
    ("--dataset", "alpaca", str, "rows: world, alpaca, tulu, ultrachat, hub id, file; NAME@SPLIT"),
    ("--eval-set", ["world_facts"], str, "conflicts: world, world_facts, capitals, bio, quotes, "
     "nq_swap, hub ids or files; a control without conflict: squad"),
    ("--template", "auto", ["auto", "alpaca", "tulu", "chat"], "prompt text; auto: alpaca for "
     "single-turn rows, else the tokenizer's own chat template, else tulu"),
    ("--num-examples", None, int, "rows to use, drawn at random (paper: all)"),
    ("--subset", "all", ["all", "context", "no-overlap", "random"], "controls of section 4; "
     "context: only rows with a context; no-overlap: only rows that name no evaluated answer or "
     "subject; random: drop as many as filter would"),
    ("--max-length", 2048, int, "tokens; longer rows are dropped, chats cut after a whole turn"),
    "remedy (section 6)",
    ("--mitigation", "none", ["none", "filter", "counterfactual", "qk"], "filter: drop rows with a "
     "redundant context; counterfactual: add rows; qk: train query and key matrices only"),
    ("--mitigation-strength", None, float, "share of the rows with a context that filter drops "
     "(paper: 0.25) or share of all rows that counterfactual adds (paper: 0.10)"),
    ("--counterfactual-data", "nq_swap", str, "conflicts to add as rows (paper: NQ-Swap)"),
    "training",
    ("--batch-size", 128, int, "examples per optimizer step (paper: 128)"),
    ("--micro-batch-tokens", 4096, int, "padded tokens per forward pass: memory, not results"),
    ("--epochs", 2.0, float, "passes over the rows (paper: up to 2)"),
    ("--max-steps", None, int, "optimizer steps at most; 0 only evaluates"),
    ("--lr", 1e-5, float, "peak learning rate, decays linearly to 0 (paper: 1e-4 or 1e-5)"),
    ("--warmup-frac", 0.03, float, "share of the steps that warm up linearly (paper: 0.03)"),
    ("--weight-decay", 0.0, float, "AdamW's decay of the weight matrices (paper: 0)"),
    ("--grad-clip", 1.0, float, "largest gradient norm; 0 never clips (paper: not stated)"),
    ("--activation-checkpointing", False, bool, "recompute activations: less memory, slower"),
    ("--lora-rank", 0, int, "train adapters of this rank (needs peft; paper: 128); 0: all weights"),
    ("--lora-alpha", 16.0, float, "adapters count alpha / rank (paper: not stated)"),
    ("--lora-dropout", 0.1, float, "dropout before the adapters (paper: not stated)"),
    ("--checkpoint-every", None, int, "optimizer steps between checkpoints, the newest two are "
     "kept; then Ctrl-C and SIGTERM save one, too (None: never)"),
    ("--resume", False, bool, "go on from the newest whole checkpoint in OUT_DIR, same flags"),
    "evaluation",
    ("--eval-every", 50, int, "optimizer steps between evaluations (paper: 50)"),
    ("--eval-limit", None, int, "items per set, drawn once at random (paper: all)"),
    ("--eval-batch-size", 32, int, "prompts generated together"),
    ("--max-new-tokens", 32, int, "tokens per answer (paper: not stated)"),
    ("--mechanism", None, bool, "at each evaluation, how hard each kind of row pushes context "
     "reliance (section 5); costs backward passes; None: only for the world"),
    ("--compare", [], str, "finished runs to put side by side; nothing is trained"),
    "machine and files",
    ("--device", "auto", str, "auto, cpu, cuda, cuda:1, mps"),
    ("--dtype", "auto", ["auto", "bf16", "fp32"], "arithmetic; auto: bf16 autocast on CUDA"),
    ("--seed", 0, int, "order of the rows and every random draw"),
    ("--out-dir", None, str, "new folder for the run; None: runs/MITIGATION, then -2, -3, ..."),
    ("--save-model", False, bool, "write the finetuned model to OUT_DIR/model"),
    ("--dry-run", False, bool, "load, tokenise, show samples and a memory estimate, then stop")]
STRENGTH = {"filter": 0.25, "counterfactual": 0.10}  # --mitigation-strength when not given
WORLD_FLAGS = dict(  # defaults with --model world
    dataset="world", eval_set=["world"], template="chat", counterfactual_data="world_train",
    lr=1e-3, batch_size=64, max_length=64, max_steps=480, eval_every=40, eval_batch_size=512,
    max_new_tokens=3)

FREE = {"resume", "checkpoint_every", "save_model", "out_dir", "rank", "ranks", "device"}  # these
# flags make no other run

def require(holds, message, status=2):
    """Go on if `holds`; else end with one line on stderr: status 2 for bad input, 1 afterwards."""
    if not holds:
        if os.environ.get("RANK", "0") == "0":  # under torchrun all ranks fail alike: told once
            print(f"inversion.py: error: {message}", file=sys.stderr)
        raise SystemExit(status)

def brief(error):
    """First line of an exception's text, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

def parse_args(argv=None):
    """Namespace of the flags above; exits with status 2 on values that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for entry in FLAGS:
        if isinstance(entry, str):
            group = parser.add_argument_group(entry)
            continue
        flag, default, kind, text = entry
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
               dict(choices=kind) if isinstance(kind, list) else
               dict(type=kind, nargs="+" if isinstance(default, list) else None))
        group.add_argument(flag, default=default, help=text, **how)
    if parser.parse_args(argv).model == "world":
        parser.set_defaults(**WORLD_FLAGS, mechanism="RANK" not in os.environ)  # no torchrun
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = int(type(value) is int and name not in ("max_steps", "seed", "lora_rank"))
            require(least <= value < math.inf,
                    f"--{name.replace('_', '-')} {value}: must be a number of at least {least}")
    require(args.micro_batch_tokens >= args.max_length, f"--micro-batch-tokens "
            f"{args.micro_batch_tokens} cannot hold one row of --max-length {args.max_length}")
    args.rank, args.ranks = (int(os.environ.get(key, one)) for key, one in (  # torchrun sets them
        ("RANK", 0), ("WORLD_SIZE", 1)))
    require(not (args.ranks > 1 and args.mechanism),
            "--mechanism runs in one process; add --no-mechanism under torchrun")
    if args.device == "auto":
        args.device = (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.ranks > 1 and
                       torch.cuda.is_available() else "cuda" if torch.cuda.is_available() else
                       "mps" if torch.backends.mps.is_available() else "cpu")
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device.startswith("cuda") else "fp32"
    args.mitigation_strength = args.mitigation_strength or STRENGTH.get(args.mitigation)
    return args

# ------------------------------------------------------------------- data: rows of known shapes
PAPER = ("https://raw.githubusercontent.com/locuslab/context-parametric-inversion/"
         "6f989849656f433d4520eaf0b9af6e3bb6a7ae70/")
NAMES = {  # short name: (hub id, split) or (the paper's file, first digits of its sha256)
    "alpaca": ("tatsu-lab/alpaca", "train"), "tulu": ("allenai/tulu-v2-sft-mixture", "train"),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", "train_sft"),
    "world_facts": (PAPER + "world_facts.json", "a040ca190e4b3517"),
    "capitals": (PAPER + "country_capitals_only.json", "c4c2b090a863bd49"),
    "bio": (PAPER + "famous_biographies.jsonl", "d08c6f1cc388d627"),
    "quotes": ("Albertmade/memo-trap", "train"), "nq_swap": ("pminervini/NQ-Swap", "dev"),
    "squad": ("rajpurkar/squad", "validation")}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

def load_rows(name):
    """Rows of a short name, hub id or file as a `datasets.Dataset`; NAME@SPLIT picks a split."""
    import datasets  # 0.8 s: only when rows are loaded
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures are told once, below
    short, _, split = (name, "", "") if Path(name).exists() else name.partition("@")
    source, detail = NAMES.get(short, (short, "train"))
    kind, url = FILE_TYPES.get(Path(source).suffix), source
    require(Path(source).exists() or short in NAMES or not kind and "/" in source,
            f"{name}: no such file or folder, no hub id, and none of {', '.join(NAMES)}")
    try:
        if url.startswith(PAPER):
            source = Path(torch.hub.get_dir(), "context-parametric-inversion", Path(url).name)
            source.parent.mkdir(parents=True, exist_ok=True)
            if not source.exists():
                torch.hub.download_url_to_file(url, source, hash_prefix=detail, progress=False)
        texts = dict(keep_default_na=False) if kind == "csv" else {}  # "NA" and "" are texts
        return (datasets.load_dataset(kind, data_files=str(source), split="train", **texts) if kind
                else datasets.load_dataset(source, split=split or detail))
    except Exception as error:  # of many types; a file without rows is StopIteration or ValueError
        local, why = Path(source).exists(), brief(error.__cause__ or error)
        empty = isinstance(error, StopIteration) or "corresponds to no data" in str(error)
        require(False, f"{name}: no rows" if empty else f"{name}{broken_line(source)}: cannot be "
                f"loaded ({why})" if local else f"{name}: cannot be fetched ({why}); get {url} "
                "where the hub can be reached and pass the local file or folder")

def broken_line(path):
    """', line N' of the first line of a JSONL file that is no JSON, else ''."""
    lines = Path(path).read_bytes().split(b"\n") if str(path).endswith(".jsonl") else []
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line.strip() or "null")
        except ValueError:
            return f", line {number}"
    return ""

def field(row, key, where, kind=str):
    """row[key], stripped if a text; exits naming file, row and key if missing or mistyped."""
    value = row.get(key) if isinstance(row, dict) else None
    require(isinstance(value, kind), f"{where}: key {key!r} is " + (
        "missing" if value is None else f"a {type(value).__name__}, which it must not be"))
    return value.strip() if kind is str else value

def to_example(row, where):
    """One finetuning row of any known shape as an example record, still without id."""
    get = lambda key, kind=str: field(row, key, where, kind)
    if row.get("data") is not None:  # UltraChat as first released: user, assistant, user, ...
        roles = itertools.cycle(["user", "assistant"])
        row = dict(messages=[dict(role=next(roles), content=text) for text in get("data", list)])
    if row.get("messages") is not None:
        messages = [dict(role=field(m, "role", where), content=field(m, "content", where))
                    for m in get("messages", list)]
        for role in {m["role"] for m in messages} - {"system", "user", "assistant"}:
            require(False, f"{where}: key 'role' is {role!r}, not system, user or assistant")
        return dict(messages=messages)
    if "completion" in row:
        return dict(context="", instruction=get("prompt"), response=get("completion"))
    require({"instruction", "output"} & set(row),
            f"{where}: key 'instruction', 'messages', 'data' or 'completion' is missing")
    return dict(context="" if row.get("input") is None else get("input"),
                instruction=get("instruction"), response=get("output"))

def load_examples(args):
    """Example records of --dataset; ids count the source's rows from 1."""
    rows = make_world(args.seed)["examples"] if args.dataset == "world" else load_rows(args.dataset)
    ids = range(len(rows))
    if args.num_examples and args.num_examples < len(rows):  # drawn: mixtures are sorted by source
        ids = sorted(random.Random(args.seed).sample(ids, args.num_examples))
    if args.dataset == "world":
        return [rows[i] for i in ids]
    return [dict(id=i + 1, **to_example(row, f"{args.dataset}, row {i + 1}"))
            for i, row in zip(ids, rows.select(ids))]

def to_conflicts(row, where):
    """Yield (context, question, context answers, parametric answers) of one row of any shape."""
    get = lambda key, kind=str: field(row, key, where, kind)
    texts = lambda key, values: [field({key: value}, key, where) for value in values]
    if "paragraphs" in row or "data" in row:  # SQuAD as released: titles, paragraphs, questions
        for title in [row] if "paragraphs" in row else get("data", list):
            for paragraph in field(title, "paragraphs", where, list):
                for qa in field(paragraph, "qas", where, list):
                    yield from to_conflicts(dict(qa, context=paragraph.get("context")), where)
    elif "classes" in row:  # memo-trap: an instruction with the odd ending, then a famous quote
        classes, right = get("classes", (list, str)), str(get("answer_index", (int, str)))
        try:  # the raw files hold a Python list as a text
            classes = ast.literal_eval(classes) if isinstance(classes, str) else classes
        except (SyntaxError, ValueError):
            classes = []
        require(len(classes) == 2 and right in ("0", "1"),
                f"{where}: keys 'classes' and 'answer_index' must be two texts and 0 or 1")
        context, _, question = get("prompt").rpartition('": ')
        right, wrong = texts("classes", classes if right == "0" else classes[::-1])
        yield context + '":', question, [right], [wrong]
    elif "sub_context" in row:  # NQ-Swap: the answers are mentions of one thing
        yield (get("sub_context"), get("question"), texts("sub_answer", get("sub_answer", list)),
               texts("org_answer", get("org_answer", list)))
    elif "answers" in row:  # SQuAD: the context is true, so there is no parametric answer
        answers = get("answers", (dict, list))
        answers = answers if isinstance(answers, list) else [
            dict(text=text) for text in field(answers, "text", where, list)]
        yield get("context"), get("question"), [field(a, "text", where) for a in answers], []
    else:  # the paper's files: CF_Bio (whose answers are people) says parametric, the others memory
        memory = "parametric_answer" if "parametric_answer" in row else "memory_answer"
        yield (get("context"), get("question"), *(
            aliases(get(key), memory == "parametric_answer") for key in ("answer", memory)))

def aliases(answer, person=False):
    """Texts that count as `answer`: 'La Paz (administrative); Sucre (judicial)' -> La Paz, Sucre;
    also a name in brackets, what stands before a comma, and a person's last name."""
    parts = re.split(r"; | or ", answer) if re.search("[;(]", answer) else [answer]
    plain = [re.sub(r" *\(.*?\)", "", part) for part in parts]
    heads = [part.split(", ")[0] for part in plain]
    last = re.findall(r"(?<!\bthe) (\S{3,})$", answer) if person else []  # Catherine the Great
    return list(dict.fromkeys(plain + heads + re.findall(r"\(([A-Z][^)]*)\)", answer) + last))

def load_conflicts(name, args, limit=None):
    """Conflict records of one set; what cannot be scored is dropped, counted and printed."""
    if name in ("world", "world_train"):
        return make_world(args.seed)[name]
    found, notes, seen = [], collections.Counter(), set()
    short = lambda mine, rival: [a for i, a in enumerate(mine) if words(a) and not (
        i and any(find(words(a), words(r)) for r in rival[:1]))]  # no alias may name the rival
    for number, row in enumerate(load_rows(name), 1):
        for context, question, right, memory in to_conflicts(row, f"{name}, row {number}"):
            right, memory = short(right, memory), short(memory, right)
            scored = [a for a in memory if not find(words(a), words(question))]
            why = ("dropped: no answer" if not right or not question else
                   "dropped: repeated" if (context, question, *right) in seen else
                   "dropped: both answers read the same" if words(right[0]) in map(words, memory)
                   else "never count as parametric: their question holds that answer"
                   if memory and not scored else "")
            notes[why] += 1
            seen.add((context, question, *right))
            if not why.startswith("dropped"):
                found.append(dict(id=notes.total(), context=context, question=question,
                                  context_answers=right, parametric_answers=scored, group=question))
    require(found, f"{name}: no usable evaluation item {dict(notes) or ''}")
    if limit and limit < len(found):
        found = [found[i] for i in sorted(random.Random(0).sample(range(len(found)), limit))]
    print(f"{name}: {len(found)} of {notes.total()} items",
          *(f"{n} {why}" for why, n in notes.items() if why), sep="; ")
    return found

# ---------------------------------------------------------------- data: templates and token lists
TEMPLATES = {"chat": None, "alpaca": (  # jinja, like a tokenizer's; None is the tokenizer's own
    "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('more than one turn') }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}Below is an instruction "
    "that describes a task{% if m.context %}, paired with an input that provides further context"
    "{% endif %}. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{{ m.content }}\n\n{% if m.context %}### Input:\n{{ m.context }}\n\n{% endif %}### Response:"
    "{% endif %}{% endfor %}"), "tulu": (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")}

def ask(context, question, template=None):
    """A question as messages: its context stands before it, in one text. Stanford's template alone
    has a place of its own for the input of Alpaca's rows, after the instruction."""
    if template == "alpaca":
        return [dict(role="user", content=question, context=context)]
    return [dict(role="user", content="\n\n".join(filter(None, [context, question])))]

def tokenize(messages, template, tokenizer):
    """[(token ids, supervised)] of a conversation in order, or the reason (str) why the template
    cannot hold it. What precedes the first response is the prompt. Parts are tokenised apart, so
    its ids are the same at training and evaluation, whatever follows."""
    show = lambda part, **kw: tokenizer.apply_chat_template(
        part, chat_template=TEMPLATES[template], tokenize=False, **kw)
    ids = lambda text: tokenizer(text, add_special_tokens=not parts).input_ids  # BOS in the first
    parts, done = [], ""
    if not messages or messages[0]["role"] == "assistant":
        return "no turn before the first response"
    try:
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not message["content"]:
                return "an empty response"
            prompt, full = show(messages[:i], add_generation_prompt=True), show(messages[:i + 1])
            if not (prompt.startswith(done) and full.startswith(prompt)):
                return "the template rewrites earlier turns"
            parts.append((ids(prompt[len(done):]), False))
            response = full[len(prompt):].rstrip()  # up to the token that ends the turn
            ends = not response.endswith(message["content"])  # else it would never learn to stop
            parts.append((ids(response) + [tokenizer.eos_token_id] * (not ends), True))
            done = prompt + response
        if not parts:  # an evaluation prompt
            parts = [(ids(show(messages, add_generation_prompt=True)), False)]
    except jinja2.TemplateError as error:
        if messages[0]["role"] == "system" and len(messages) > 1:  # refused: fold it into the next
            user = dict(messages[1], content="\n\n".join(m["content"] for m in messages[:2]))
            return tokenize([user] + messages[2:], template, tokenizer)
        return f"the template refuses the turns ({brief(error)})"
    prompt = parts[0][0]  # no second BOS from the template, no EOS by the tokenizer's habit
    twice, ended = prompt[:2] == [tokenizer.bos_token_id] * 2, prompt[-1] == tokenizer.eos_token_id
    parts[0] = (prompt[twice:len(prompt) - ended], False)
    return parts

def encode(examples, args, tokenizer):
    """Training rows {id, input_ids, labels} (int32 tensors, -100 where unsupervised), and a Counter
    of what was dropped or cut and why: too long a row loses its last turns, never its EOS."""
    rows, notes = [], collections.Counter()
    for example in tqdm(examples, "tokenise", leave=False, disable=None):
        parts = tokenize(example.get("messages") or ask(
            example["context"], example["instruction"], args.template) + [
            dict(role="assistant", content=example["response"])], args.template, tokenizer)
        if isinstance(parts, str):
            notes[f"dropped: {parts}"] += 1
            continue
        ids, labels, fits, wanted = [], [], 0, 0
        for part, supervised in parts:
            ids += part
            labels += part if supervised else [-100] * len(part)
            wanted = len(ids) if supervised else wanted
            fits = wanted if wanted <= args.max_length else fits
        if fits:
            ids, labels = (torch.tensor(x[:fits], dtype=torch.int32) for x in (ids, labels))
            rows.append(dict(id=example["id"], input_ids=ids, labels=labels))
        if not wanted:
            notes["dropped: no response"] += 1
        elif fits < wanted:
            notes["cut to the turns that fit --max-length" if fits else
                  "dropped: longer than --max-length"] += 1
    return rows, notes

# ----------------------------------------------------------------------- forward passes for all
def autocast(args):
    """bf16 autocast if asked for; weights stay fp32, or small updates are lost in rounding."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "bf16")

def micro_batches(rows, budget):
    """Cut rows, sorted by length, into lists of at most `budget` padded tokens, or of one row."""
    batches = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if not batches or (len(batches[-1]) + 1) * len(row["input_ids"]) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches

def supervised_logits(model, rows):
    """Logits (N, vocabulary) in fp32, targets (N,) and row numbers (N,) of the N supervised tokens.
    Right padding needs no attention mask in a causal model, and its labels are -100. The hook lets
    only supervised positions through the head: most of the memory, in any family and version."""
    ids, labels = (torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], True, fill)
                   .long().to(model.device) for key, fill in (("input_ids", 0), ("labels", -100)))
    keep = labels[:, 1:] != -100  # position t predicts token t + 1
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0][:, :-1][keep],))
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    return logits, labels[:, 1:][keep], keep.nonzero()[:, 0]

@torch.no_grad()
def target_logprobs(model, rows, args):
    """(summed log-probability, number) of each row's supervised tokens, teacher-forced."""
    sums = {}
    for batch in micro_batches(rows, args.micro_batch_tokens):
        with autocast(args):
            logits, targets, owner = supervised_logits(model, batch)
        logp = -F.cross_entropy(logits, targets, reduction="none")
        total = logp.new_zeros(len(batch)).index_add_(0, owner, logp).tolist()
        for row, *pair in zip(batch, total, owner.bincount(minlength=len(batch)).tolist()):
            sums[id(row)] = pair
    return [sums[id(row)] for row in rows]

def mean(values):
    """Mean of numbers, None of none."""
    values = list(values)
    return sum(values) / len(values) if values else None

# --------------------------------------------------------------------------- the built-in world
WORLD = dict(  # change any of it: the base model is pretrained anew
    known=80, novel=200, answers=24,  # subjects with and without facts; answers per relation
    pretraining_steps=700, facts_per_document=4, true=0.7,  # else a random answer: soft memory
    reading=0.5, reading_known=0.7, reading_true=0.2,  # passages; on known subjects; that are true
    follows_known=0.5, follows_novel=0.4,  # answers that follow the passage: copying, half learned
    examples=20_000, critical=0.6, redundant=0.2,  # finetuning mixture; the rest is recall
    misleading=0.05)  # share of redundant rows whose passage is about another subject
RELATIONS = ("capital", "language")
STATEMENTS = ("The {r} of {s} is", "Today the {r} of {s} is", "They say the {r} of {s} is")
QUESTIONS = ("What is the {r} of {s}?", "Name the {r} of {s}.", "Tell me the {r} of {s}.")

def make_world(seed):
    """Made-up facts and all that is said about them, as text: documents (pretraining; * marks the
    targets, | ends a turn), examples (finetuning, with their true kind) and conflicts.

    Known subjects have one true answer per relation, learned in pretraining. Three in four, the
    tuned ones, occur in finetuning, the others only in the evaluation, which keeps to every other
    answer, so that --subset no-overlap leaves rows. Kinds (section 4.3):
        critical   a novel subject and a passage with a random answer: only the passage helps
        redundant  a tuned subject and a true passage, but for the `misleading` share, whose passage
                   is about another subject: memory is the better guide, as section 5 assumes
        recall     a tuned subject and no passage"""
    rng, names = random.Random(f"world {seed}"), {}
    pick, chance = rng.choice, lambda key: rng.random() < WORLD[key]
    while len(names) < WORLD["known"] + WORLD["novel"] + 2 * WORLD["answers"]:
        name = "".join(pick("bdfgklmnprstvz") + pick("aeiou") for _ in range(pick([2, 3])))
        names[name.capitalize() + pick(["", "n", "r", "l", "s"])] = True
    names = iter(names)
    take = lambda key: list(itertools.islice(names, WORLD[key]))
    known, novel, answers = take("known"), take("novel"), {r: take("answers") for r in RELATIONS}
    held = known[::4]
    tuned = [s for s in known if s not in held]
    some = lambda s, r: answers[r][::2] if s in held else answers[r]
    truth = {(s, r): pick(some(s, r)) for s in known for r in RELATIONS}
    wrong = lambda s, r, n: rng.sample([a for a in some(s, r) if a != truth[s, r]], n)
    tell = lambda s, r, a: f"{pick(STATEMENTS).format(s=s, r=r)} {a}."
    query = lambda s, r: pick(QUESTIONS).format(s=s, r=r)

    def document():
        s, r = pick(known if chance("reading_known") else novel), pick(RELATIONS)
        if chance("reading"):
            memory = truth.get((s, r)) or pick(answers[r])
            told = memory if chance("reading_true") else pick(answers[r])
            said = told if chance("follows_known" if s in known else "follows_novel") else memory
            return f"{tell(s, r, told)} {query(s, r)} *{said} *|"
        facts = [(s, r, truth[s, r] if chance("true") else pick(answers[r]))
                 for s in rng.sample(known, WORLD["facts_per_document"]) for r in [pick(RELATIONS)]]
        return " ".join(pick([f"{query(s, r)} *{a} *|", tell(s, r, "*" + a)]) for s, r, a in facts)

    def example():
        r, kind, (s, other) = pick(RELATIONS), rng.random(), rng.sample(tuned, 2)
        if kind < WORLD["critical"]:
            s, a = pick(novel), pick(answers[r])
            return dict(kind="critical", context=tell(s, r, a), instruction=query(s, r), response=a)
        told = other if chance("misleading") else s
        redundant = kind < WORLD["critical"] + WORLD["redundant"]
        return dict(kind="redundant" if redundant else "recall", instruction=query(s, r),
                    context=tell(told, r, truth[told, r]) * redundant, response=truth[s, r])

    def conflict(s, r, told, control=None):
        memory = [] if control else [truth[s, r]]
        return dict(id=f"{s} {r} {control or told}", context=tell(s, r, told), question=query(s, r),
                    context_answers=[told], parametric_answers=memory, group=s, control=control)

    facts = lambda subjects: itertools.product(subjects, RELATIONS)
    return dict(
        documents=[document() for _ in range(64 * WORLD["pretraining_steps"])],
        examples=[dict(example(), id=i + 1) for i in range(WORLD["examples"])],
        world=[conflict(s, r, a) for s, r in facts(held) for a in wrong(s, r, 2)]
        + [conflict(s, r, truth[s, r], "agreeing") for s, r in facts(held)]
        + [conflict(s, r, pick(answers[r]), "reading") for s, r in facts(novel[:len(held)])],
        world_train=[conflict(s, r, a) for s, r in facts(tuned) for a in wrong(s, r, 11)])

def world_tokenizer(world):
    """A token per word; | ends a turn."""
    texts = world["documents"] + [e["context"] + e["response"] for e in world["examples"]]
    vocabulary = ["<s>", "|"] + sorted(set(re.findall(r"\w+|[.?]", " ".join(texts))))
    tokenizer = Tokenizer(models.WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token="|"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="|", chat_template="{{ bos_token }}"
        "{% for m in messages %}{{ m.content + ' ' }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}")

def world_model(args, runs):
    """Folder of the world's base model: in `runs` from an earlier run, or pretrained now by the
    loop that finetunes. Its key covers all that shapes it; a torn folder is made anew."""
    source = [inspect.getsource(f) for f in (
        make_world, world_tokenizer, world_model, train, supervised_logits)]
    key = str([WORLD, STATEMENTS, QUESTIONS, args.seed, args.dtype, args.device, torch.__version__,
               torch.get_num_threads(), transformers.__version__, source])
    digest = lambda data: hashlib.sha256(data).hexdigest()
    folder = Path(runs, f"world-{args.seed}-{digest(key.encode())[:12]}")
    weights, seal = folder / "model.safetensors", folder / "sha256"
    if weights.exists() and seal.exists() and seal.read_text() == digest(weights.read_bytes()):
        return folder
    print(f"pretraining the world's base model, once; it is kept in {folder}")
    world, documents = make_world(args.seed), []
    tokenizer = world_tokenizer(world)
    vocabulary = tokenizer.get_vocab()
    for n, text in enumerate(world["documents"]):
        parts = ["<s>"] + re.findall(r"\*?(?:\w+|[.?|])", text)
        documents.append(dict(
            id=n, input_ids=torch.tensor([vocabulary[p.strip("*")] for p in parts]),
            labels=torch.tensor([vocabulary[p[1:]] if p[0] == "*" else -100 for p in parts])))
    torch.manual_seed(args.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=1))
    base = argparse.Namespace(**vars(args) | dict(
        batch_size=64, lr=2e-3, warmup_frac=0.05, weight_decay=0, grad_clip=1.0, ranks=1,
        micro_batch_tokens=4096, eval_every=10**9, checkpoint_every=None))
    train(model.to(args.device), documents, WORLD["pretraining_steps"], {}, base, lambda *_: None)
    new = Path(f"{folder}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    for part in (model, tokenizer):
        part.save_pretrained(new)
    (new / "sha256").write_text(digest((new / "model.safetensors").read_bytes()))
    return new.rename(folder)

# ------------------------------------------------------------------------- mitigations (section 6)
def without_context(example):
    """The example without its context, or None if it has none. In a chat, the context is all that
    precedes the last paragraph of the first user turn."""
    if "messages" not in example:
        return dict(example, context="") if example["context"] else None
    messages = list(example["messages"])
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    *context, question = re.split(r"\n\s*\n", messages[first]["content"])
    messages[first] = dict(messages[first], content=question)
    return dict(example, messages=messages) if context else None

def context_free_loss(model, tokenizer, examples, rows, args):
    """{row id: mean target loss per token WITHOUT the context} of the rows that have one, under the
    model as it is, lowest first (section 4.3: the base model); ties keep the rows' order."""
    ids = {row["id"] for row in rows}
    bare = [e for e in map(without_context, examples) if e and e["id"] in ids]
    bare, _ = encode(bare, args, tokenizer)
    with gathered(model.eval(), args):
        scores = zip(bare, share_out(lambda rows: target_logprobs(model, rows, args), bare, args))
    loss = {row["id"]: -total / n for row, (total, n) in scores}
    return {i: loss[i] for i in sorted(loss, key=loss.get)}

def redundant_rows(loss, share, examples):
    """Ids of the `share` of rows whose context the base model needs least (section 4.3); in the
    world, where the true kinds are known, prints how well that finds them."""
    found = set(list(loss)[:round(share * len(loss))])
    true = {e["id"] for e in examples if e.get("kind") == "redundant"} & set(loss)
    if found and true:
        print(f"lowest {share:.0%} of {len(loss)} context-free losses against the world's "
              f"redundant rows:\n  precision {len(found & true) / len(found):.3f}, recall "
              f"{len(found & true) / len(true):.3f}")
    return found

def filter_rows(model, tokenizer, examples, rows, args):
    """Rows less the --mitigation-strength of those with a context that need it least."""
    loss = context_free_loss(model, tokenizer, examples, rows, args)
    drop = redundant_rows(loss, args.mitigation_strength, examples)
    require(0 < len(drop) < len(rows), f"--mitigation filter: {len(loss)} rows of {args.dataset} "
            f"have a context; dropping {len(drop)} of {len(rows)} rows leaves nothing to compare")
    values = list(loss.values())
    print(f"filter: dropped {len(drop)} of the {len(loss)} rows with a context; loss without it: "
          f"{mean(values[:len(drop)]):.3f} (at most {values[len(drop) - 1]:.3f}), of the rows kept "
          f"{mean(values[len(drop):]) or math.nan:.3f}")
    return [row for row in rows if row["id"] not in drop]

def subset_rows(examples, rows, sets, args):
    """The rows that --subset leaves (section 4), and prints how many those are. A subject is a run
    of capitalised words in an evaluated question, its first word aside."""
    examples = {e["id"]: e for e in examples}
    context = {row["id"] for row in rows if without_context(examples[row["id"]])}
    if args.subset == "context":
        keep = context
    elif args.subset == "random":
        drop = round(STRENGTH["filter"] * len(context))
        keep = set(random.Random(args.seed).sample([r["id"] for r in rows], len(rows) - drop))
    else:
        conflicts = [c for items in sets.values() for c in items if c["parametric_answers"]]
        subject = r"(?<=\s)[A-Z][\w'-]*(?: (?:(?:of|the|de|du) )*[A-Z][\w'-]*)*"
        names = {tuple(words(name)) for c in conflicts for name in c["context_answers"]
                 + c["parametric_answers"] + re.findall(subject, c["question"])} - {()}
        sizes, keep = {len(name) for name in names}, set()
        for row in rows:
            e = examples[row["id"]]
            said = words(" ".join([m["content"] for m in e["messages"]] if "messages" in e else
                                  [e["context"], e["instruction"], e["response"]]))
            if not any(tuple(said[i:i + n]) in names for n in sizes for i in range(len(said))):
                keep.add(row["id"])
    print(f"subset {args.subset}: dropped {len(rows) - len(keep)} of {len(rows)} rows "
          f"({1 - len(keep) / len(rows):.1%})")
    require(keep, f"--subset {args.subset}: leaves no row of {args.dataset}")
    return [row for row in rows if row["id"] in keep]

def counterfactual_examples(sets, count, args):
    """`count` conflicts as examples that follow their context; none shares a question or an answer
    with the evaluation sets."""
    answers = lambda c: (  # the world's few answers serve all facts: there the question must differ
        [] if args.counterfactual_data == "world_train" else
        c["context_answers"] + c["parametric_answers"])
    texts = lambda c: {tuple(words(text)) for text in [c["question"], *answers(c)]}
    evaluated = set().union(*(texts(c) for items in sets.values() for c in items))
    found = load_conflicts(args.counterfactual_data, args)
    free = [c for c in found if not texts(c) & evaluated]
    require(free, f"--counterfactual-data {args.counterfactual_data}: all of it is being evaluated")
    added = random.Random(args.seed).sample(free, min(count, len(free)))
    print(f"counterfactual: added {len(added)} rows ({count} wanted); {len(found) - len(free)} of "
          f"{len(found)} share a question or an answer with the evaluation sets and stay out")
    reply = lambda c: [dict(role="assistant", content=c["context_answers"][0])]
    return [dict(id=f"{args.counterfactual_data}:{c['id']}",
                 messages=ask(c["context"], c["question"]) + reply(c)) for c in added]

def freeze_all_but_query_key(model):
    """Make query and key matrices alone trainable. Returns {name of a fused parameter: bool
    mask of its query and key entries}; the training loop holds the others still.

    With a single token the softmax is over one key, so queries and keys get no gradient and values
    do: that finds them in any layout (separate, fused per head or stacked, transposed). Exits when
    it finds another number of rows than the head counts say: no layout is guessed at."""
    masks, config, heads = {}, model.config, model.config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    expected = (heads + (getattr(config, "num_key_value_heads", None) or heads)) * size
    tokens = torch.arange(64, device=model.device)[:, None] % config.vocab_size
    model.eval()(input_ids=tokens, use_cache=False).logits.square().sum().backward()
    for layer in (m for m in model.modules() if type(m).__name__.endswith("Attention")):
        linear = [m for m in layer.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
        out = [int(type(m).__name__ == "Conv1D") for m in linear]  # the dimension of its features
        flow = [m.weight.grad.norm(dim=1 - d) for m, d in zip(linear, out)]
        still = [f <= 1e-5 * max(g.max() for g in flow) for f in flow]
        require(sum(int(rows.sum()) for rows in still) == expected, "--mitigation qk: "
                f"{type(layer).__name__} holds queries and keys in a layout unknown here")
        for m, d, rows in zip(linear, out, still):
            if rows.any():
                masks[m.weight] = rows.unsqueeze(1 - d).expand_as(m.weight)
                masks.update({m.bias: rows} if getattr(m, "bias", None) is not None else {})
    require(masks, f"--mitigation qk: {type(model).__name__} has no attention layer known here")
    model.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.requires_grad_(p in masks)
    moving = sum(int(mask.sum()) for mask in masks.values())
    print(f"qk: trains {moving} of {model.num_parameters()} weights")
    return {name: masks[p] for name, p in model.named_parameters()
            if p in masks and not masks[p].all()}

# ------------------------------------------------------------------------------------ evaluation
CELLS = {(1, 0): "context_only", (0, 1): "parametric_only", (1, 1): "both", (0, 0): "neither"}

def words(text):
    """Words of a text as compared: no case, accents, punctuation or articles; U.S. is us."""
    text = unicodedata.normalize("NFKD", text).casefold()
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"(?<=\d),(?=\d{3})|(?<=\b[^\W\d_])\.|['’]s\b|['’`]", "", text)
    text = re.sub(r"\bkilomet(er|re)s?\b", "km", text)
    return [w for w in re.findall(r"[^\W_]+", text) if w not in ("a", "an", "the")]

def find(part, whole):
    """Spans (start, end) at which the word list `part` stands in `whole`."""
    return [(i, i + len(part)) for i in range(len(whole) - len(part) + 1)
            if whole[i:i + len(part)] == part]

def score(text, conflict):
    """(context hit, parametric hit) of an answer: contained, as the paper counts, as whole words.
    An echo of the question is cut out first; where two answers overlap, the longer one counts:
        context New Cairo, memory Cairo   It is New Cairo. (1, 0)     Cairo, then New Cairo (1, 1)
        context Bo, memory Freetown       Bosnia (0, 0)               Not Freetown but Bo (1, 1)"""
    said, question = words(text), words(conflict["question"])
    for start, end in find(question, said)[:1]:
        del said[start:end]
    ours, theirs = ([span for a in conflict[key] for span in find(words(a), said)]
                    for key in ("context_answers", "parametric_answers"))
    inside = lambda a, spans: any(b[0] <= a[0] and a[1] <= b[1] and a != b for b in spans)
    return (any(not inside(a, theirs) for a in ours), any(not inside(a, ours) for a in theirs))

def prepare(conflicts, args, tokenizer, room):
    """Add to each conflict its prompts (with context, closed book) and the rows of its margin. What
    exceeds the `room` of positions that the model has for a prompt is dropped and counted."""
    for item in conflicts:
        prompt, closed = (tokenize(ask(context, item["question"]), args.template, tokenizer)[0][0]
                          for context in (item["context"], ""))
        item.update(prompt=prompt, closed_book_prompt=closed, answers=[])
        for answers in filter(None, (item["context_answers"], item["parametric_answers"])):
            ids = tokenizer(answers[0], add_special_tokens=False).input_ids
            item["answers"].append(dict(input_ids=torch.tensor(prompt + ids),
                                        labels=torch.tensor([-100] * len(prompt) + ids)))
    fitting = [c for c in conflicts if len(c["prompt"]) <= room]
    require(fitting, f"every evaluation prompt is longer than the model's {room} positions for it")
    if len(fitting) < len(conflicts):
        print(f"{len(conflicts) - len(fitting)} items dropped: longer than {room} tokens")
    return fitting

@torch.no_grad()
def generate(model, tokenizer, prompts, args):
    """Greedy answers (texts) to prompts (token lists): left-padded batches, longest first."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), args.eval_batch_size):
        batch = order[start:start + args.eval_batch_size]
        width = len(prompts[batch[0]])
        pads = [[0] * (width - len(prompts[i])) for i in batch]  # any id: the mask hides it
        ids = torch.tensor([pad + prompts[i] for pad, i in zip(pads, batch)], device=model.device)
        mask = torch.tensor([pad + [1] * len(prompts[i]) for pad, i in zip(pads, batch)])
        out = model.generate(input_ids=ids, attention_mask=mask.to(model.device), use_cache=True,
                             max_new_tokens=args.max_new_tokens)
        for i, answer in zip(batch, out[:, width:].tolist()):
            texts[i] = tokenizer.decode(answer, skip_special_tokens=True)
    return texts

def evaluate(model, tokenizer, items, args):
    """Ask every item with and without its context: one outcome dict per item, with text, cell,
    context and parametric hit, closed_book hit, margin (log p(context answer) - log p(parametric
    answer), each per token) and m_c (Theorem 1: p(context) / (p(context) + p(parametric))). The
    first call fixes item["known"]. Leaves training undisturbed."""
    conflicts = [item for item in items if item["parametric_answers"]]
    was_training = model.training
    model.eval()  # in train mode, dropout is on and generation under checkpointing is wrong
    try:
        prompts = [item["prompt"] for item in items] + [i["closed_book_prompt"] for i in conflicts]
        with gathered(model, args), autocast(args):
            texts = share_out(lambda some: generate(model, tokenizer, some, args), prompts, args)
            logps = share_out(lambda rows: target_logprobs(model, rows, args),
                              [row for item in conflicts for row in item["answers"]], args)
    finally:
        model.train(was_training)
    closed, logps = iter(texts[len(items):]), iter(logps)
    outcomes = []
    for item, text in zip(items, texts):
        hit = score(text, item)
        outcomes.append(dict(
            id=item["id"], group=item["group"], control=item.get("control"), text=text,
            cell=CELLS[hit], context=hit[0], parametric=hit[1], known=False, conflict=False))
        if item["parametric_answers"]:
            said, (ours, n), (theirs, k) = next(closed), next(logps), next(logps)
            found = score(said, item)[1]
            outcomes[-1].update(
                conflict=True, closed_book=found, closed_book_text=said,
                known=item.setdefault("known", found), margin=ours / n - theirs / k,
                m_c=1 / (1 + math.exp(min(theirs - ours, 700))))
    return outcomes

def rates(outcomes):
    """Metrics of one evaluation: shares of all items and, as *_known, of those that the base model
    knew; parametric ones are over the items that have a parametric answer."""
    controls = {o["control"]: None for o in outcomes if o.get("control")}
    accs = {f"{c}_acc": mean(o["context"] for o in outcomes if o["control"] == c) for c in controls}
    outcomes = [o for o in outcomes if not o.get("control")]
    conflicts = [o for o in outcomes if o["conflict"]]
    line = dict(n=len(outcomes), context_acc=mean(o["context"] for o in outcomes), **accs)
    line["context_acc_low"], line["context_acc_high"] = interval(outcomes)
    if not conflicts:  # SQuAD: nothing to contradict
        return line
    line["n_known"] = sum(o["known"] for o in conflicts)
    for suffix, part in (("", outcomes), ("_known", [o for o in conflicts if o["known"]])):
        line["context_acc" + suffix] = mean(o["context"] for o in part)
        line["parametric_acc" + suffix] = mean(o["parametric"] for o in part if o["conflict"])
        for cell in CELLS.values():
            line[cell + suffix] = mean(o["cell"] == cell for o in part)
    return line | {key: mean(o[name] for o in conflicts)
                   for key, name in (("closed_book_acc", "closed_book"), ("margin", "margin"),
                                     ("m_c", "m_c"))}

# ---------------------------------------------------------------- statistics: how sure we are
RESAMPLES, LEVEL = 2000, torch.tensor([0.025, 0.975], dtype=torch.float64)  # of a 95% interval

def resample(groups, seed=0):
    """How often each group is drawn: (1 + RESAMPLES, groups) counts; row 0 is the data as it is."""
    own = torch.Generator().manual_seed(seed)
    draws = torch.randint(groups, (RESAMPLES, groups), generator=own)
    counts = torch.zeros(RESAMPLES, groups, dtype=torch.float64)
    counts.scatter_add_(1, draws, torch.ones_like(counts[:1]).expand_as(counts))
    return torch.cat([torch.ones_like(counts[:1]), counts])

def by_group(evaluations):
    """Hits (evaluations, groups) and items (groups,) of lists of outcomes on the same items. Items
    of one group (the biographies that share a question) are no independent evidence."""
    names = {name: i for i, name in enumerate(dict.fromkeys(o["group"] for o in evaluations[0]))}
    owner = torch.tensor([names[o["group"]] for o in evaluations[0]])
    hits = torch.tensor([[o["context"] for o in e] for e in evaluations], dtype=torch.float64)
    return (torch.zeros(len(hits), len(names), dtype=torch.float64).index_add_(1, owner, hits),
            owner.bincount().double())

def interval(outcomes):
    """95% bootstrap interval (low, high) of context_acc, resampling groups."""
    hits, items = by_group([outcomes])
    counts = resample(len(items))
    return (counts @ hits[0] / (counts @ items))[1:].quantile(LEVEL).tolist()

def mcnemar(before, after):
    """Two-sided exact p of McNemar's test on paired hits: are changes one way as likely as back?"""
    lost, won = (sum(a and not b for a, b in pairs)
                 for pairs in (list(zip(before, after)), list(zip(after, before))))
    return min(1.0, 2 * sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))
               / 2 ** (lost + won))

def summarise(lines, evaluations):
    """Start, peak and final context_acc of one set, and its drop. The highest of many evaluations
    is too high by luck, so the peak step is chosen on one half of the groups and the drop measured
    on the other, both ways, and averaged, in each of the resamples. McNemar's p compares the peak
    of all items with the end. An interval above zero makes an inversion, if it comes from at least
    six groups: fewer cannot show anything at p < 0.05, even if all change (2 / 2**6 = 0.03)."""
    evaluations = [[o for o in e if not o["control"]] for e in evaluations]
    hits, items = by_group(evaluations)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    halves = (order[::2], order[1::2] if len(order) > 1 else order)
    accs = []
    for seed, half in enumerate(halves):  # (1 + RESAMPLES, evaluations)
        counts = resample(len(half), seed)
        accs.append(counts @ hits[:, half].T / (counts @ items[half])[:, None])
    drops = sum(theirs.gather(1, ours.argmax(1, keepdim=True))[:, 0] - theirs[:, -1]
                for ours, theirs in (accs, accs[::-1])) / 2
    (low, high), peak = drops[1:].quantile(LEVEL).tolist(), int(hits.sum(1).argmax())
    context = [[o["context"] for o in e] for e in evaluations]
    smallest = max(6 / items.sum().item(), (high - low) / 2)
    name = "inversion" if any(o["conflict"] for o in evaluations[0]) else "drop"  # SQuAD: a control
    return dict(start=lines[0]["context_acc"], peak=lines[peak]["context_acc"],
                peak_step=lines[peak]["step"], final=lines[-1]["context_acc"],
                drop=drops[0].item(), drop_low=low, drop_high=high, smallest_drop=smallest,
                mcnemar_p=mcnemar(context[peak], context[-1]),
                verdict=name if low > 0 and len(items) >= 6 else f"no {name} shown")

# ------------------------------------------------------------------------ mechanism (section 5)
PROBE = 160  # rows per kind, and conflicts, that it is measured on

def probe_rows(model, tokenizer, examples, rows, args):
    """{kind: at most PROBE rows}, drawn before any subset or remedy, so that runs compare. Kinds as
    in section 4.3: recall has no context; of the rows with one, redundant are the 25% of lowest
    context-free loss under the base model; critical are the others."""
    rows = random.Random(args.seed).sample(rows, min(len(rows), 5 * PROBE))
    loss = context_free_loss(model, tokenizer, examples, rows, args)
    redundant = redundant_rows(loss, 0.25, examples)
    kinds = dict(critical=[], redundant=[], recall=[])
    for row in rows:
        kind = ("recall" if row["id"] not in loss else
                "redundant" if row["id"] in redundant else "critical")
        kinds[kind] += [row] * (len(kinds[kind]) < PROBE)
    return {kind: rows for kind, rows in kinds.items() if rows}

def gradient(model, rows, masks, args):
    """Sum over rows of row["weight"] x log p(its targets), and the gradient of that: one fp32
    tensor per trainable parameter. Touches no .grad."""
    names, trained = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    total, value = [torch.zeros_like(p) for p in trained], 0.0
    for batch in micro_batches(rows, args.micro_batch_tokens):
        with autocast(args):
            logits, targets, owner = supervised_logits(model, batch)
        weight = torch.tensor([row["weight"] for row in batch], device=model.device)
        part = -(weight[owner] * F.cross_entropy(logits, targets, reduction="none")).sum()
        for t, g in zip(total, torch.autograd.grad(part, trained, allow_unused=True)):
            t += 0 if g is None else g
        value += part.item()
    return value, [t * masks.get(name, 1) for t, name in zip(total, names)]

def mechanism(model, tokenizer, items, probe, masks, args):
    """Section 5 on one set of conflicts, as metrics. KIND_loss: loss now. KIND_push: the inner
    product of the gradient of the mean margin with minus the gradient of that loss, so a small
    step on this kind alone changes the margin by lr x push: above 0 it raises context reliance.
    Proposition 1: critical > 0 early, redundant < 0 later; Proposition 2: recall < 0. KIND_cosine:
    the same of unit length. attention: see there."""
    conflicts = [item for item in items if item["parametric_answers"]]
    conflicts = random.Random(0).sample(conflicts, min(len(conflicts), PROBE))
    targets = lambda row: int((row["labels"][1:] >= 0).sum())
    dot = lambda a, b: sum((x * y).sum().item() for x, y in zip(a, b))
    found, was_training = {}, model.training
    model.eval()  # no dropout: no random number is drawn
    try:
        margin = [dict(row, weight=sign / targets(row) / len(conflicts))
                  for c in conflicts for sign, row in zip((1, -1), c["answers"])]
        _, margin = gradient(model, margin, masks, args)
        for kind, rows in probe.items():
            n = sum(map(targets, rows))
            value, toward = gradient(model, [dict(row, weight=1 / n) for row in rows], masks, args)
            push, norms = dot(margin, toward), dot(margin, margin) * dot(toward, toward)
            found |= {f"{kind}_loss": -value, f"{kind}_push": push,
                      f"{kind}_cosine": push / math.sqrt(norms) if norms else 0.0}
        shares = [attention(model, tokenizer, item, args) for item in conflicts]
        found["attention"] = mean(share for share in shares if share is not None)
    finally:
        model.train(was_training)
    return found

@torch.no_grad()
def attention(model, tokenizer, item, args):
    """Share of its attention that the last prompt token pays to the context's tokens, mean over
    heads and layers (figure 3b); None if the model shows none. The others come from a cache, so
    that eager attention, which alone shows its weights, is computed for one token."""
    squeeze = lambda text: "".join(text.split())  # decoding may add or lose spaces
    text, context = squeeze(tokenizer.decode(item["prompt"])), squeeze(item["context"])
    if "span" not in item:
        ends = [len(squeeze(tokenizer.decode(item["prompt"][:i + 1])))
                for i in range(len(item["prompt"]))]
        start = text.find(context)
        item["span"] = [i - len(ends) for i, end in enumerate(ends)
                        if 0 <= start < end <= start + len(context)]
    ids = torch.tensor([item["prompt"]], device=model.device)
    usual = model.config._attn_implementation
    with autocast(args):
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        model.set_attn_implementation("eager")
        try:
            layers = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True,
                           output_attentions=True).attentions
        finally:
            model.set_attn_implementation(usual)
    seen = lambda layer: [i for i in item["span"] if -i <= layer.shape[-1]]  # a sliding window
    return mean(layer[0, :, 0, seen(layer)].float().sum(-1).mean().item()
                for layer in layers or () if item["span"])

# -------------------------------------------------------------------------------------- training
def train(model, rows, total, masks, args, evaluate_at, save=None, state=None, stopped=()):
    """Finetune in place for `total` optimizer steps, calling evaluate_at(step, log) and
    save(optimizer, step, log) at intervals; `state` is a checkpoint to go on from, and a signal's
    number in `stopped` ends the run after the step at hand.

    The loss is summed over supervised tokens and divided by the supervised tokens of the WHOLE
    step, over all ranks, so that neither the cut into micro-batches nor a short last batch changes
    what a token weighs. `masks` (qk) hold back the gradient of what must not move."""
    masks = {p: masks[name] for name, p in model.named_parameters() if name in masks}
    if args.ranks > 1:
        masks = {p: torch.distributed.tensor.distribute_tensor(
            mask, p.device_mesh, p.placements) for p, mask in masks.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = {p for p in trained if p.ndim > 1 and p not in masks}  # no biases, no norms
    optimizer = torch.optim.AdamW([
        dict(params=[p for p in trained if (p in decayed) == decays], weight_decay=decay)
        for decays, decay in ((True, args.weight_decay), (False, 0.0))], fused=True)
    steps_per_epoch = math.ceil(len(rows) / args.batch_size)
    warmup, order, tokens, seconds = math.ceil(args.warmup_frac * total), None, 0, 0.0
    first, stop, log = 0, False, dict(loss=None, lr=None, supervised_tokens=0)
    if state:
        first, log = state["step"], state["log"]
        restore(model, optimizer, state, args)
    progress = tqdm(total=total, initial=first, unit="step", disable=args.rank > 0 or None)
    for step in range(first, total + 1):
        at_end, resumed = step == total, bool(state) and step == first
        if (step % args.eval_every == 0 or at_end) and not resumed:
            evaluate_at(step, dict(log, tokens_per_second=tokens / seconds if tokens else None))
            tokens, seconds = 0, 0.0
        if at_end:
            break
        if step > first and args.checkpoint_every and (
                step % args.checkpoint_every == 0 or stop):
            save(optimizer, step, log)
            require(not stop, f"stopped after step {step} and saved; --resume goes on from "
                    "there", 128 + (stopped or [signal.SIGTERM])[0])
        start, (epoch, k) = time.perf_counter(), divmod(step, steps_per_epoch)
        if k == 0 or order is None:
            shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(rows), generator=shuffle).tolist()
        batch = [rows[i] for i in order[k * args.batch_size:(k + 1) * args.batch_size]]
        targets = sum(int((row["labels"][1:] != -100).sum()) for row in batch)
        lr = args.lr * min((step + 1) / max(warmup, 1), (total - step) / max(total - warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr  # above 0 in every step, the first and the last included
        model.train()
        torch.manual_seed(hash((args.seed, step, args.rank)))  # dropout: the same after --resume
        sums = torch.zeros(2, device=args.device)  # loss, stop
        micros = micro_batches(batch, args.micro_batch_tokens)
        real, padding = len(micros), -len(micros) % args.ranks  # equal numbers, or ranks would wait
        micros += micros[:1] * padding                          # for ever; the extra ones weigh 0
        for i in range(args.rank, len(micros), args.ranks):
            if args.ranks > 1:
                model.set_requires_gradient_sync(i + args.ranks >= len(micros))
            with autocast(args):
                logits, wanted, _ = supervised_logits(model, micros[i])
            part = F.cross_entropy(logits, wanted, reduction="sum") * (i < real) / targets
            (part * args.ranks).backward()  # FSDP2 averages over the ranks
            sums[0] += part.detach()
        for p, mask in masks.items():
            p.grad.mul_(mask)  # before clipping: what does not move has no say in the norm
        norm = torch.nn.utils.clip_grad_norm_(trained, args.grad_clip or math.inf)
        sums[1] = len(stopped)
        if args.ranks > 1:
            norm = norm.full_tensor()
            torch.distributed.all_reduce(sums)
        loss = sums[0]
        require(loss.isfinite() and norm.isfinite(), f"step {step + 1}: loss {loss:.4g}, gradient "
                f"norm {norm:.4g} in the batch of rows {', '.join(str(r['id']) for r in batch)}", 1)
        optimizer.step()
        for p, mask in masks.items() if args.weight_decay else ():
            p.data.mul_(1 - lr * args.weight_decay * mask)
        optimizer.zero_grad(set_to_none=True)
        tokens += sum(len(row["input_ids"]) for row in batch)
        seconds += time.perf_counter() - start
        stop = sums[1].item() > 0
        log = dict(loss=loss.item(), lr=lr, supervised_tokens=log["supervised_tokens"] + targets)
        progress.set_postfix_str(f"loss {log['loss']:.3f}, {tokens / seconds:.0f} tokens/s", False)
        progress.update()
    progress.close()

# ------------------------------------------------- large models: adapters, several GPUs, --resume
WHOLE = dict(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)

def add_lora(model, args):
    """The model with fp32 adapters on its linear layers (with qk: on query and key projections);
    they are evaluated beside the weights, and merged into them only by --save-model."""
    try:
        import peft
    except ImportError:
        require(False, "--lora-rank needs a package that is not there: pip install peft")
    where = "all-linear"
    if args.mitigation == "qk":
        require(not freeze_all_but_query_key(model), f"--lora-rank with --mitigation qk: "
                f"{type(model).__name__} fuses values with queries and keys; an adapter moves all")
        where = [name for name, module in model.named_modules() if getattr(
            getattr(module, "weight", None), "requires_grad", False)]
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
        target_modules=where, task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"lora: trains {trained} weights beside {model.num_parameters() - trained}")
    return model

def shard(model, args):
    """Spread weights, gradients and optimizer over the ranks with FSDP2, a decoder layer at a time:
    fp32 shards are the masters; a layer is gathered, in bf16 if asked for, while it computes."""
    from torch.distributed import device_mesh, fsdp
    mesh = device_mesh.init_device_mesh(args.device.split(":")[0], (args.ranks,))
    policy = fsdp.MixedPrecisionPolicy(
        torch.bfloat16 if args.dtype == "bf16" else None, torch.float32)
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
    fsdp.register_fsdp_forward_method(model, "generate")  # a PeftModel's gathers nothing by itself

@contextlib.contextmanager
def gathered(model, args):
    """All weights on every rank meanwhile: then ranks may do unequal work without waiting."""
    units = [m for m in model.modules() if args.ranks > 1 and hasattr(m, "unshard")]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()

def share_out(work, items, args):
    """work(items), rank r doing items r, r + ranks, ...; all get all results, in order."""
    if args.ranks == 1:
        return work(items)
    found = [None] * args.ranks
    torch.distributed.all_gather_object(found, work(items[args.rank::args.ranks]))
    return [found[i % args.ranks][i // args.ranks] for i in range(len(items))]

def on_rank_0(work, args):
    """work(), done by rank 0 alone; all ranks get its result."""
    found = [work() if args.rank == 0 else None]
    if args.ranks > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]

def save_model(model, tokenizer, folder, args):
    """Write the finetuned model, adapters merged in, as `from_pretrained` reads it."""
    from torch.distributed.checkpoint import state_dict
    model, weights = model.merge_and_unload() if args.lora_rank else model, None
    if args.ranks > 1:
        weights = state_dict.get_model_state_dict(model, options=state_dict.StateDictOptions(
            full_state_dict=True, cpu_offload=True))
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATES[args.template]
    if args.rank == 0:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

def save_checkpoint(model, optimizer, step, log, folder, args):
    """Write OUT_DIR/checkpoint-STEP.pt, whole or not at all, and keep the newest two. It holds the
    trained weights unsharded, so it fits any number of ranks; the order of the rows and dropout
    follow from seed and step."""
    from torch.distributed.checkpoint import state_dict
    weights, state = state_dict.get_state_dict(
        model, optimizer, options=state_dict.StateDictOptions(**WHOLE))
    if args.rank:
        return
    path = folder / f"checkpoint-{step}.pt"
    new = path.with_suffix(".new")
    try:
        with open(new, "wb") as file:
            torch.save(dict(step=step, log=log, weights=weights, optimizer=state,
                            run=(folder / "args.json").read_text()), file)
        new.replace(path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        new.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free / 2**30
        require(False, f"{path}: cannot be written ({brief(error.__context__ or error)}; "
                f"{free:.1f} GiB are free); earlier ones are kept", 1)
    for old in [p for p in checkpoints(folder) if int(p.stem[11:]) <= step][:-2]:
        old.unlink()

def checkpoints(folder):
    """Checkpoint files of a run, the newest last."""
    found = [p for p in folder.glob("checkpoint-*.pt") if p.stem[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.stem[11:]))

def load_checkpoint(folder):
    """The newest whole checkpoint of this very run, or None; what is torn or foreign is named."""
    for path in reversed(checkpoints(folder)):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["run"] == (folder / "args.json").read_text():
                print(f"{path}: going on after step {state['step']}")
                return state
            why = "of another run"
        except Exception as error:  # of many types: torn archive, no such key
            why = brief(error)
        print(f"{path}: skipped ({why})")
    print(f"{folder}: no checkpoint to go on from; starting at step 0")

def restore(model, optimizer, state, args):
    """Put a checkpoint's weights and optimizer state in place; rank 0 hands them to the others."""
    from torch.distributed.checkpoint import state_dict
    how = state_dict.StateDictOptions(**WHOLE, broadcast_from_rank0=args.ranks > 1)
    state_dict.set_model_state_dict(model, state.get("weights", {}), options=how)
    state_dict.set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=how)

VERSIONS = dict(python=sys.version.split()[0], torch=torch.__version__,
                transformers=transformers.__version__)

def note_flags(rows, sets, total, folder, args):
    """Write args.json: flags, versions, a fingerprint of the data. With --resume, exit if a flag
    or the data differs from what is written there in a way that makes another run."""
    data = hashlib.sha256()
    for row in rows + [row for items in sets.values() for i in items for row in i["answers"]]:
        data.update(row["input_ids"].numpy().tobytes() + row["labels"].numpy().tobytes())
    flags = dict(vars(args), steps=total, data=data.hexdigest(), versions=VERSIONS)
    if args.rank == 0 and not args.resume:
        append(folder / "args.json", [flags])
    if not args.resume:
        return
    try:
        saved = json.loads((folder / "args.json").read_text().splitlines()[0])
    except (ValueError, IndexError):
        require(False, f"--resume {folder / 'args.json'}: is torn; start the run anew")
    changed = [f"--{key.replace('_', '-')} {value} (was {saved.get(key)})"
               for key, value in flags.items()
               if key not in FREE | {"data", "versions"} and value != saved.get(key)]
    require(not changed, f"--resume {folder}: would be another run with {', '.join(changed)}")
    require(flags["data"] == saved["data"], f"--resume {folder}: the rows or the evaluation items "
            "are no longer those of that run")

def rewind(folder, state, sets):
    """What the run wrote up to the checkpoint, as history and outcomes; lines after it, or torn,
    leave the files."""
    found, last = {}, state["step"] if state else -1
    for name in ("metrics.jsonl", "generations.jsonl"):
        found[name], path = [], folder / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                found[name] += [x for x in [json.loads(line)] if x["step"] <= last]
        path.with_suffix(".new").unlink(missing_ok=True)
        append(path.with_suffix(".new"), found[name])
        path.with_suffix(".new").replace(path)
    outcomes = {name: [] for name in sets}
    for (_, name), said in itertools.groupby(found["generations.jsonl"],
                                             lambda line: (line["step"], line["set"])):
        outcomes[name].append([dict(o, context=o["cell"] in ("context_only", "both"),
                                    conflict=o["closed_book_text"] is not None) for o in said])
        for item, o in zip(sets[name], outcomes[name][0]):
            item["known"] = o["known"]
    return found["metrics.jsonl"], outcomes

# ---------------------------------------------------------------------------------------- report
def plan(rows, notes, args):
    """Print the row counts and the batch arithmetic; return the number of optimizer steps."""
    per_epoch = math.ceil(len(rows) / args.batch_size)
    total = math.ceil(args.epochs * per_epoch)
    total = total if args.max_steps is None else min(total, args.max_steps)
    lengths = [len(row["input_ids"]) for row in rows]
    supervised = sum(int((row["labels"] >= 0).sum()) for row in rows)
    passes = mean(len(micro_batches(rows[i:i + args.batch_size], args.micro_batch_tokens))
                  for i in range(0, min(len(rows), 20 * args.batch_size), args.batch_size))
    print(f"{args.dataset}: {len(rows)} rows" + "".join(f"; {n} {why}" for why, n in notes.items()))
    print(f"tokens: {sum(lengths)}, {supervised} supervised; {mean(lengths):.0f} per row, at most "
          f"{max(lengths)}\nsteps: {total} of {args.batch_size} rows ({per_epoch} per epoch); each "
          f"{passes:.1f} forward passes of up to {args.micro_batch_tokens} tokens")
    return total

def dry_run(model, tokenizer, rows, args):
    """Show three samples with the supervised part in [[ ]], and estimate the memory of training."""
    for row in rows[:3]:
        print(f"\nrow {row['id']}:", end=" ")
        pairs = zip(row["input_ids"].tolist(), row["labels"].tolist())
        for supervised, part in itertools.groupby(pairs, lambda pair: pair[1] >= 0):
            text = tokenizer.decode([token for token, _ in part])
            print(f"[[{text}]]" if supervised else text, end="")
    n, config, size = model.num_parameters(), model.config, 2 if args.dtype == "bf16" else 4
    trained = n
    if args.lora_rank and args.mitigation != "qk":
        trained = add_lora(model, args).num_parameters() - n
    layer = 17 * config.hidden_size * size  # bytes per token that a layer keeps, about; with
    kept = (layer + config.num_hidden_layers * config.hidden_size * size  # checkpointing its input
            if args.activation_checkpointing else layer * config.num_hidden_layers)
    share = mean((row["labels"] >= 0).float().mean().item() for row in rows)
    copy = 0 if size == 4 else 2  # autocast's bf16 copies
    gib = [x / 2**30 for x in (  # fp32 weights; gradient and AdamW's two; logits thrice
        n * (4 + copy) + trained * 12, args.micro_batch_tokens * kept,
        args.micro_batch_tokens * share * config.vocab_size * 12)]
    print(f"\n\nmemory, estimated: {sum(gib):.1f} GiB = {gib[0]:.1f} weights, gradients and AdamW "
          f"of {trained / 1e6:.0f}M trained weights + {gib[1]:.1f} activations + {gib[2]:.1f} "
          "logits")
    for ranks in (8, 16):
        each = (gib[0] * 2**30 - n * copy) / ranks / 2**30
        print(f"on each of {ranks} GPUs (torchrun): {each + gib[1] + gib[2]:.1f} GiB to train, "
              f"{each + n * size / 2**30:.1f} to evaluate, with all weights gathered")

CONTROLS = ("agreeing_acc", "closed_book_acc", "reading_acc")  # must not fall with context_acc

def table_row(line=None):
    """One aligned row of the table (its head without a line), with a bar as long as context_acc."""
    columns = (("step", ">6", ""), ("set", "<12.12", ""), ("context_acc", ">11", ".3f"),
               ("parametric_acc", ">14", ".3f"), ("margin", ">7", ".2f"), ("loss", ">6", ".3f"))
    value = lambda key, form: (key if line is None else "-" if line.get(key) is None else
                               format(line[key], form))
    text = " ".join(format(value(key, form), width) for key, width, form in columns)
    room = min(40, shutil.get_terminal_size().columns - len(text) - 2)
    return text + ("" if line is None else " |" + "#" * round(room * line["context_acc"]))

def verdict(name, lines, summary):
    """What to say of one set: where context_acc starts, peaks and ends, how sure the drop is."""
    last, peak = lines[-1], next(l for l in lines if l["step"] == summary["peak_step"])
    low, high = (last[f"context_acc_{end}"] for end in ("low", "high"))
    controls = [f"{key} {peak[key]:.3f} -> {last[key]:.3f}" for key in CONTROLS if key in last]
    text = f"{name}: context_acc {last['context_acc']:.3f} [{low:.3f}, {high:.3f}]."
    if len(lines) > 1:
        hint = (f" ({last['n']} items could show a drop of {summary['smallest_drop']:.3f})"
                if summary["smallest_drop"] < 1 else f" ({last['n']} items are too few)")
        text = (f"{name}: context_acc starts at {summary['start']:.3f}, peaks at "
                f"{summary['peak']:.3f} (step {summary['peak_step']}) and ends at "
                f"{summary['final']:.3f} (step {last['step']}).\n  Drop, the peak chosen on other "
                f"items: {summary['drop']:.3f} [{summary['drop_low']:.3f}, "
                f"{summary['drop_high']:.3f}]; McNemar p = {summary['mcnemar_p']:.2g}.\n  Verdict: "
                f"{summary['verdict']}{hint * summary['verdict'].startswith('no ')}.")
    return text + (f"\n  From the peak on: {', '.join(controls)}." if controls else "")

def show_answers(items, first, last):
    """Print what the model said about ten items in the first and in the last evaluation."""
    shown = [i for i, item in enumerate(items) if not item.get("control")]
    print(f"\nfirst and last answer to ten of {len(shown)} conflicts:")
    for i in shown[::math.ceil(len(shown) / 10)]:
        memory = "".join(f", memory: {a}" for a in items[i]["parametric_answers"][:1])
        print(f"  {items[i]['question'][:90]} (context: {items[i]['context_answers'][0]}{memory})")
        for outcome in (first[i], last[i]):
            print(f"    {outcome['cell']:<16} {' '.join(outcome['text'].split())[:90]}")

def show_mechanism(lines, peak_step):
    """Print what section 5 is about at the first step, at the peak and at the last."""
    kinds = [key for key in lines[0] if key.endswith("_push")]
    lines = {line["step"]: line for line in lines if line["step"] in (0, peak_step)} | {
        lines[-1]["step"]: lines[-1]}
    print(f"\n{lines[0]['set']}: push of each kind on context reliance (> 0 raises it), share of "
          "attention on\nthe context, and m_c = p(context) / (p(context) + p(parametric)):")
    form = {key: (14, "+.4f") for key in kinds} | {"attention": (9, ".3f"), "m_c": (6, ".3f")}
    print("  step", *(key.rjust(width) for key, (width, _) in form.items()))
    for step, line in lines.items():
        print(f"{step:>6}", *(("-" if line[key] is None else format(line[key], how)).rjust(width)
                              for key, (width, how) in form.items()))

def draw_curve(curves, path, single=False):
    """Draw context_acc over the steps for {label: [lines of metrics.jsonl, a list per run]}, with
    its 95% interval or each run behind the mean; of a single run also parametric_acc and a panel
    with the mechanism. Needs matplotlib."""
    try:
        import matplotlib.figure
    except ImportError:
        return print(f"no {path.name}: pip install matplotlib")
    keys = set().union(*(runs[0][0] for runs in curves.values() if "attention" in runs[0][0]))
    inside = [key for key in ("critical_cosine", "redundant_cosine", "recall_cosine", "attention",
                              "m_c") if single and key in keys]
    figure = matplotlib.figure.Figure(figsize=(7, 7 if inside else 5), layout="constrained")
    axes = figure.subplots(1 + bool(inside), sharex=True, squeeze=False)[:, 0]
    column = lambda lines, key: [line[key] for line in lines]
    for i, (label, runs) in enumerate(curves.items()):
        look, steps = dict(color=f"C{i}", markersize=4), column(runs[0], "step")
        average = [mean(values) for values in zip(*(column(run, "context_acc") for run in runs))]
        axes[0].plot(steps[:len(average)], average, "o-", label=f"{label} context_acc", **look)
        for run in runs if len(runs) > 1 else ():
            axes[0].plot(column(run, "step"), column(run, "context_acc"), alpha=0.3, lw=0.7, **look)
        if len(runs) == 1:
            axes[0].fill_between(steps, column(runs[0], "context_acc_low"),
                                 column(runs[0], "context_acc_high"), color=f"C{i}", alpha=0.15)
        if single and "parametric_acc" in runs[0][0]:
            axes[0].plot(steps, column(runs[0], "parametric_acc"), "s:",
                         label=f"{label} parametric_acc", **look)
        for j, key in enumerate(inside if "attention" in runs[0][0] else ()):
            axes[1].plot(steps, column(runs[0], key), ("o-", "s:", "^--")[i % 3], color=f"C{j + 2}",
                         markersize=4, label=f"{label} {key}")
    axes[0].set(ylabel="share of answers", ylim=(0, 1.02))
    if inside:
        axes[1].axhline(0, color="gray", lw=0.7)
        axes[1].set_ylabel("KIND_cosine > 0: that kind raises it")
    axes[-1].set_xlabel("optimizer steps")
    for ax in axes if single else ():
        ax.legend(frameon=False, fontsize="small")
    if not single:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)

def append(path, lines):
    """Append dicts to a JSONL file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

def load_run(folder):
    """A finished run as [one dict per set: its summary, flags that count, lines of metrics]; exits
    if the folder holds none, a half-written or a foreign one."""
    found = []
    for name in ("args.json", "metrics.jsonl", "summary.json"):
        require((folder / name).is_file(), f"--compare {folder}: has no {name}; it is "
                + ("no run" if name == "args.json" else "a run that has not finished"))
        try:
            found.append(list(map(json.loads, open(folder / name, encoding="utf-8"))))
        except ValueError as error:
            require(False, f"--compare {folder / name}: is torn ({brief(error)})")
    (flags, *_), lines, (summary, *_) = found
    require({"seed", "steps", "mitigation", "model"} <= set(flags) and
            {line.get("set") for line in lines} == set(summary),
            f"--compare {folder}: is no run of this script")
    setting = {key: value for key, value in flags.items() if key not in FREE | {
        "mechanism", "seed", "data", "versions", "steps"}}
    runs = []
    for name, numbers in summary.items():
        mine = [line for line in lines if line["set"] == name]
        runs.append(dict(
            numbers, set=name, setting=setting, lines=mine, last=mine[-1],
            at_peak=next(line for line in mine if line["step"] == numbers["peak_step"])))
    return runs

def compare(folders, path):
    """Print one table of finished runs, those that differ in nothing but the seed together, and
    draw their curves to `path`."""
    runs = [run for folder in folders for run in load_run(Path(folder))]
    setting, groups = runs[0]["setting"], collections.defaultdict(list)
    differ = [key for key, value in setting.items()
              if any(run["setting"].get(key) != value for run in runs)]
    for run in runs:
        values = [run["setting"].get(key) for key in differ or ["mitigation"]]
        groups[", ".join([str(value) for value in values if value is not None] + [run["set"]] * (
            len({run["set"] for run in runs}) > 1))].append(run)
    width, average = max(map(len, groups)), lambda group, key: mean(run[key] for run in group)
    print(f"{', '.join(differ) or 'mitigation'}; start, peak, final and drop are of context_acc\n"
          f"{'':{width}}   n start  peak final   drop   95%          agree closed  read  steps "
          " tokens")
    for label, group in groups.items():
        low, high = average(group, "drop_low"), average(group, "drop_high")
        if len(group) > 1:
            drops = torch.tensor([run["drop"] for run in group], dtype=torch.float64)
            low, high = (resample(len(group)) @ drops / len(group))[1:].quantile(LEVEL).tolist()
        fell = [mean(run["last"][key] - run["at_peak"][key] for run in group if key in run["last"])
                for key in CONTROLS]
        print(f"{label:{width}} {len(group):>3}", *(
            f"{average(group, key):5.2f}" for key in ("start", "peak", "final")),
            f"{average(group, 'drop'):6.2f} [{low:5.2f}, {high:5.2f}]",
            *("    -" if c is None else f"{c:+5.2f}" for c in fell),
            *(f"{mean(run['last'][key] for run in group):{form}}"
              for key, form in (("step", "6.0f"), ("supervised_tokens", "7.0f"))))
    print("95%: of one run over its items, of several over the runs; agree, closed, read: controls "
          "at\nthe end less at the peak; tokens: supervised ones trained on")
    for key in ("step", "supervised_tokens"):
        values = {run["last"][key] for run in runs}
        if len(values) > 1:
            print(f"warning: the runs differ in {key}, {min(values)} to {max(values)}: part of a "
                  "difference between them may be that", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_curve({label: [run["lines"] for run in group] for label, group in groups.items()}, path)
    print(f"curves in {path}")

# ------------------------------------------------------------------------------------------ main
def new_folder(args):
    """The folder of this run, not yet made; with --resume, the one to go on in."""
    usual = Path("runs", "compare" if args.compare else args.mitigation)
    names = itertools.chain([usual], (Path(f"{usual}-{i}") for i in itertools.count(2)))
    taken = list(itertools.takewhile(Path.exists, names))
    if args.resume:
        path = Path(args.out_dir or (taken or [usual])[-1])
        require((path / "args.json").is_file(), f"--resume {path}: holds no run; name an --out-dir")
        require(not (path / "summary.json").exists(), f"--resume {path}: has finished")
        return path
    path = Path(args.out_dir or (f"{usual}-{len(taken) + 1}" if taken else usual))
    require(not path.exists() or path.is_dir() and not any(path.iterdir()), f"--out-dir {path}: "
            "holds another run or other files; name a new folder, or go on with --resume")
    return path

def load_model(args, source):
    """(model with fp32 weights, tokenizer) of a hub id or folder; no weights under --dry-run."""
    auto, safe, info = transformers.AutoModelForCausalLM, dict(trust_remote_code=False), {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **safe)
        if args.dry_run:
            config = transformers.AutoConfig.from_pretrained(source, **safe)
            with torch.device("meta"):
                model = auto.from_config(config, dtype=torch.float32)
        else:
            model, info = auto.from_pretrained(source, dtype=torch.float32, **safe,
                                               use_safetensors=True, output_loading_info=True)
            model = model.to(args.device if args.ranks == 1 else "cpu").eval()  # shards go there
    except Exception as error:  # of many types: wrong name, no hub, torn files, other architecture
        require(False, f"--model {args.model}: cannot be loaded as a causal LM ({brief(error)}); "
                "pass a hub id or a local folder with config.json, tokenizer and .safetensors")
    missing = ", ".join(sorted(info.get("missing_keys", [])))
    require(not missing, f"--model {args.model} is no causal LM: its weights lack {missing[:200]}")
    if not args.dry_run:
        a, b = model(input_ids=torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device)).logits
        require((a - b)[:2].abs().max() <= 1e-5 * a.abs().max(),
                f"--model {args.model} is no causal LM: its tokens see the ones after them")
    size = model.get_input_embeddings().num_embeddings
    require(tokenizer.eos_token_id is not None and len(tokenizer) <= size,
            f"--model {args.model}: its tokenizer has no EOS token, or more tokens than the model")
    return model, tokenizer

def choose_template(model, tokenizer, examples, args):
    """Settle --template, make generation greedy, and return the positions left for a prompt."""
    single = all("messages" not in e for e in examples)
    if args.template == "auto":
        args.template = ("alpaca" if examples and single else "chat" if tokenizer.chat_template else
                         "alpaca" if single else "tulu")
    require(args.template != "chat" or tokenizer.chat_template,
            f"--template chat: the tokenizer of {args.model} has no chat template; try tulu")
    hello = ask("", "Hi") + [dict(role="assistant", content="Hello")]
    end = tokenize(hello, args.template, tokenizer)[-1][0][-1]  # Llama-3's turns have their own
    stops = sorted({tokenizer.eos_token_id, end})
    model.generation_config = transformers.GenerationConfig(  # nothing inherited: no sampling, no
        do_sample=False, bos_token_id=tokenizer.bos_token_id,  # penalties
        eos_token_id=stops, pad_token_id=tokenizer.eos_token_id)
    model.generation_config.validate(strict=True)  # or save_pretrained could refuse, hours later
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    require(args.max_length <= positions,
            f"--max-length {args.max_length}: {args.model} has {positions} positions")
    return positions - args.max_new_tokens

def main(argv=None):
    """Do what the flags say; return the history: the lines of metrics.jsonl as dicts."""
    args = parse_args(argv)
    if args.ranks == 1:
        return experiment(args)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    own = not torch.distributed.is_initialized()
    if own:
        torch.distributed.init_process_group(
            "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
    with contextlib.redirect_stdout(open(os.devnull, "w") if args.rank else sys.stdout):
        history = experiment(args)
    if own:
        torch.distributed.destroy_process_group()
    return history

def experiment(args):
    """One run, from the flags to the history."""
    began, out_dir = time.perf_counter(), on_rank_0(lambda: new_folder(args), args)
    if args.compare:
        return compare(args.compare, out_dir / "compare.png")
    transformers.utils.logging.disable_progress_bar()
    sets = {Path(name).stem: load_conflicts(name, args, args.eval_limit) for name in args.eval_set}
    require(len(sets) == len(args.eval_set), "--eval-set: two sets of the same name")
    examples = [] if args.max_steps == 0 else load_examples(args)
    source = args.model
    if args.model == "world":
        source = on_rank_0(lambda: world_model(args, out_dir.parent), args)
    model, tokenizer = load_model(args, source)
    room = choose_template(model, tokenizer, examples, args)
    sets = {name: prepare(items, args, tokenizer, room) for name, items in sets.items()}
    for kind, e in {e["kind"]: e for e in reversed(examples) if "kind" in e}.items():  # the world's
        print(f"  {kind:<10} {e['context']} {e['instruction']} -> {e['response']}")
    every_row, notes = encode(examples, args, tokenizer)
    require(every_row or not examples, f"{args.dataset}: no usable row: {dict(notes)}")
    rows = every_row
    if args.subset != "all" and rows:
        rows = subset_rows(examples, rows, sets, args)
    if args.mitigation == "counterfactual" and rows:
        more, dropped = encode(counterfactual_examples(
            sets, round(args.mitigation_strength * len(rows)), args), args, tokenizer)
        rows, notes = rows + more, notes + dropped
    if args.dry_run:
        plan(rows, notes, args)
        return dry_run(model, tokenizer, rows, args)
    out_dir.mkdir(parents=True, exist_ok=True)
    probe, masks = {}, {}
    if args.mechanism and rows:
        probe = probe_rows(model, tokenizer, examples, every_row, args)
    torch.manual_seed(args.seed)  # adapters
    if args.lora_rank and rows:
        model = add_lora(model, args)
    elif args.mitigation == "qk" and rows:
        masks = freeze_all_but_query_key(model)
    if args.ranks > 1:
        shard(model, args)
    if args.mitigation == "filter" and rows:
        rows = filter_rows(model, tokenizer, examples, rows, args)
    total = plan(rows, notes, args) if rows else 0
    if args.activation_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    note_flags(rows, sets, total, out_dir, args)
    print(f"{args.model}: {model.config.model_type}, {model.num_parameters() / 1e6:.1f}M weights, "
          f"{args.dtype} on {args.device}, template {args.template}\n"
          f"{', '.join(map(' '.join, VERSIONS.items()))}; files in {out_dir}\n\n{table_row()}")
    return run(model, tokenizer, rows, sets, probe, total, masks, out_dir, began, args)

def run(model, tokenizer, rows, sets, probe, total, masks, out_dir, began, args):
    """Train and evaluate, write and print as it goes, report at the end; return the history."""
    history, outcomes, state = [], {name: [] for name in sets}, None
    if args.resume:
        state = load_checkpoint(out_dir) if args.rank == 0 else None
        if args.rank == 0:
            history, outcomes = rewind(out_dir, state, sets)
        light = on_rank_0(lambda: state and dict(step=state["step"], log=state["log"]), args)
        state = state or light  # rank 0 hands the weights to the others in restore()

    def evaluate_at(step, log):
        for name, items in sets.items():
            found = evaluate(model, tokenizer, items, args)
            if args.rank:
                continue
            outcomes[name].append(found)
            inside = (mechanism(model, tokenizer, items, probe, masks, args)
                      if args.mechanism and any(o["conflict"] for o in found) else {})
            history.append(dict(step=step, set=name, **rates(found), **inside, **log,
                                seconds=round(time.perf_counter() - began, 2)))
            tqdm.write(table_row(history[-1]))
            append(out_dir / "metrics.jsonl", history[-1:])
            hashes = [hashlib.sha256(str(i["prompt"]).encode()).hexdigest()[:16] for i in items]
            keys = ("id", "group", "control", "known", "text", "cell", "closed_book_text")
            append(out_dir / "generations.jsonl", [
                dict(step=step, set=name, prompt=prompt, **{key: o.get(key) for key in keys})
                for prompt, o in zip(hashes, found)])

    stopped, usual = [], {}

    def stop(number, _):
        stopped.append(number)
        signal.signal(number, usual[number])  # the second time, at once

    if args.checkpoint_every:
        usual = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(model, rows, total, masks, args, evaluate_at, state=state, stopped=stopped,
              save=lambda *now: save_checkpoint(model, *now, out_dir, args))
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if args.save_model:
        save_model(model, tokenizer, out_dir / "model", args)
    if args.rank == 0:
        report(history, outcomes, sets, out_dir)
    return history

def report(history, outcomes, sets, out_dir):
    """Print answers, mechanism and verdict of each set; write curve.png and summary.json."""
    for name, items in sets.items():
        show_answers(items, outcomes[name][0], outcomes[name][-1])
    curves = {name: [[line for line in history if line["set"] == name]] for name in sets}
    summaries = {name: summarise(lines, outcomes[name]) for name, (lines,) in curves.items()}
    for name, (lines,) in curves.items():
        if "attention" in lines[0]:
            show_mechanism(lines, summaries[name]["peak_step"])
        print("\n" + verdict(name, lines, summaries[name]))
    draw_curve(curves, out_dir / "curve.png", single=True)
    append(out_dir / "summary.json", [summaries])  # last: it marks a run that has finished

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        require(False, "interrupted; the evaluations so far are in the run's folder", 130)
    except OSError as error:  # a full disk, say
        require(False, f"{brief(error)}; what was written before is complete", 1)
