"""Sections `data` and datapacks of RWKV-infctx-trainer as sources of ours: see `upstream`."""

from typing import Any

Told = list[tuple[str, str, str]]  # key, what became of it, note
FILES = {"text": "text", "json": "jsonl", "csv": "text", "parquet": "text"}
PACKED = "lanes read documents one after another, each from its beginning, without padding"
# Keys that stand for nothing any more, and why.
NEEDLESS = {
    "skip_datapath_setup": "fit prepares what is missing or stale", "data_path_storage_options": "paths are local",
    "text_rechunk_size": "documents of any length are read whole",
    "text_rechunk_auto": "documents of any length are read whole", "packing_enable": PACKED,
    "packing_batchsize": PACKED, "packing_chunksize": PACKED, "packing_min_ctx_len": PACKED,
    "packing_in_sequence": PACKED, "sort_by_length": "the planner fills lanes by length", "sort_asc": "",
    "test_split_shuffle": "held-out documents are drawn at random", "processing_max_batch_size": "files are a stream",
    "dataloader_shuffle_training": "documents are shuffled anew in each epoch",
    "dataloader_prefetch_factor": "", "dataloader_pin_memory": "", "dataloader_swap_train_test_split": "",
    "world_add_endoftext_token": "documents end with id 0", "source_data_dir": "", "source_dataset_params": "",
    "name": "", "batchsize": "", "mixed_batch_percentage": "", "mixing_mode": "documents of all sources are shuffled",
}  # fmt: skip
# Keys that are accepted at these values only, and why.
NEUTRAL: dict[str, tuple[Any, str]] = {
    "text_rechunk_force": (False, "documents of any length are read whole"),
    "data_prefix_skip_mask": (0, "masks are by format"),
    "dataset_offset": (-1, "cut the file yourself"),
    "reverse_train_dataset_before_save": (False, "documents are shuffled anew in each epoch"),
    "datapack_config_path": (None, "convert that file, and take its data.source"),
    "conversation_input_key_map": (None, "templates are world, chatml and the tokenizer's own"),
    "conversation_input_key_prefix_map": (None, "templates are world, chatml and the tokenizer's own"),
    "conversation_sender_value_map": (None, "templates are world, chatml and the tokenizer's own"),
    "conversation_end_of_conversation": (None, "templates are world, chatml and the tokenizer's own"),
    "conversation_input_key_mask": (None, "name the roles in data.source.learn"),
    "conversation_sender_mask": (None, "name the roles in data.source.learn"),
    "conversation_sender_suffix": (None, "templates are world, chatml and the tokenizer's own"),
    "conversation_sender_key": (None, "conversations have role and content, or from and value"),
}
COLUMNS = "multi_column_"


def data_section(given: dict[str, Any]) -> tuple[dict[str, Any], Told]:
    """Our section `data`, and what became of each key."""
    out, told = dict[str, Any](), Told()
    source, lines = source_of(given)
    for key, value in given.items():
        if key == "data_path":
            out["path"] = value
            told.append((key, "changed", "data.path; tokens are prepared anew"))
        elif key == "tokenizer":
            out["tokenizer"] = {"neox": "EleutherAI/gpt-neox-20b", "binidx": "world"}.get(str(value), value)
            told.append(
                (key, "kept" if out["tokenizer"] == value else "renamed", f"data.tokenizer: {out['tokenizer']}")
            )
        elif key == "test_split":
            out["validation"] = value
            told.append((key, "renamed", "data.validation: a share, or a count of documents"))
    if source:
        out["source"] = source
    told += lines
    known = {key for key, _, _ in told}
    for key, value in given.items():
        if key not in known:
            fine = value in (None, -1, False, [])
            told.append((key, "not needed", "") if fine else (key, "refused", "no such key is known"))
    return out, told


def datapack(given: dict[str, Any]) -> tuple[dict[str, Any], Told]:
    """Our section `data` with a list of sources, from a datapack."""
    head, default = given.get("datapack") or {}, given.get("default") or {}
    out, told = data_section({**default, **head})
    own = out.pop("source", None)
    told = [(f"default.{key}" if key in default else f"datapack.{key}", what, note) for key, what, note in told]
    sources = []
    for i, entry in enumerate(given.get("dataset") or ([own] if own else [])):
        source, lines = source_of({**{k: v for k, v in default.items() if k != "data_path"}, **entry})
        if entry.get("name"):
            source["name"] = entry["name"]
        if "dataset_weight" in entry:
            source["weight"] = entry["dataset_weight"]
            lines.append(("dataset_weight", "changed", "data.source.weight: how often an epoch reads each document"))
        sources.append(source)
        told += [(f"dataset.{i}.{key}", what, note) for key, what, note in lines if key in entry]
    return {**out, "source": sources}, told


def source_of(given: dict[str, Any]) -> tuple[dict[str, Any], Told]:
    """One source, and what became of the keys that are about it."""
    source, told = dict[str, Any](), Told()
    if given.get("source") is not None:
        _path(given, source, told)
    _format(given, source, told)
    if given.get("source") == "csv" and source.get("format") == "text":
        source.setdefault("column", "text")
    for key, value in given.items():
        if key in NEUTRAL:
            neutral, why = NEUTRAL[key]
            told.append((key, "not needed" if value in (neutral, None) else "refused", why))
        elif key in ("min_token_size", "max_token_size") and value is not None and value > 0:
            name = key.replace("_size", "s")
            source |= {name: value} | ({"too_long": "drop"} if name == "max_tokens" else {})
            told.append((key, "renamed", f"data.source.{name}" + (", too_long: drop" if name == "max_tokens" else "")))
        elif key == "dataset_length" and value not in (-1, None):
            whole = float(value) >= 1
            source |= {"limit": int(value)} if whole else {}
            told.append((key, "renamed" if whole else "refused", "data.source.limit" if whole else "give a count"))
        elif key in ("min_token_size", "max_token_size", "dataset_length"):
            told.append((key, "not needed", ""))
        elif key in NEEDLESS:
            told.append((key, "not needed", NEEDLESS[key]))
    return source, told


def _path(given: dict[str, Any], source: dict[str, Any], told: Told) -> None:
    kind, params = str(given["source"]), given.get("source_dataset_params") or {}
    files = params.get("data_files") or given.get("source_data_dir")
    if given.get("tokenizer") == "binidx":
        source |= {"path": files or kind, "format": "binidx"}
    elif kind in FILES:
        if not isinstance(files, str):
            told.append(
                ("source", "refused", "name the files, or a folder, in data.source.path; a list is several sources")
            )
            return
        source |= {"path": files, "format": FILES[kind]}
    else:
        source |= {"path": f"hf:{kind}", "split": given.get("source_dataset_split", "train")}
        if params.get("name"):
            source["subset"] = params["name"]
    told.append(("source", "renamed", f"data.source.path: {source['path']}"))
    if "source_dataset_split" in given:
        told.append(("source_dataset_split", "renamed", "data.source.split"))


def _format(given: dict[str, Any], source: dict[str, Any], told: Told) -> None:
    keys = given.get(f"{COLUMNS}keys")
    if given.get("custom_text_key"):
        source["column"] = given["custom_text_key"]
        told.append(("custom_text_key", "renamed", "data.source.column"))
    elif given.get("conversation_format"):
        source |= {"format": "messages", "template": "world"}
        if given.get("conversation_key"):
            source["column"] = given["conversation_key"]
            told.append(("conversation_key", "renamed", "data.source.column"))
        told.append(("conversation_format", "changed", "data.source.format: messages; the assistant is learnt"))
    elif keys:
        affixes = [given.get(f"{COLUMNS}{name}") or [""] * len(keys) for name in ("prefix", "suffix")]
        between = given.get(f"{COLUMNS}separator") or ""
        suffix = [str(x or "") + between * (i + 1 < len(keys)) for i, x in enumerate(affixes[1])]
        source |= {"format": "instruction", "columns": keys, "prefix": [x or "" for x in affixes[0]], "suffix": suffix}
        mask = given.get(f"{COLUMNS}train_mask")
        if mask:
            source["learn"] = [key for key, learnt in zip(keys, mask, strict=False) if learnt]
        note = "data.source.format: instruction; prefixes are not learnt, the end of what is learnt is"
        told += [(key, "changed", note) for key in given if key.startswith(COLUMNS)]
    if given.get("disable_prompt_completion_mask"):
        source |= {"format": "completion", "learn": ["prompt", "completion"]}
        told.append(("disable_prompt_completion_mask", "renamed", "data.source.learn: all columns"))
