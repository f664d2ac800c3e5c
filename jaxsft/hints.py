"""What an option of other trainers is called here, or why there is none; typing errors.

The names are those of TRL and transformers, axolotl, unsloth, LLaMA-Factory, torchtune, MaxText and
Tunix. An option of another meaning is never suggested: nothing is better than a wrong value.
"""

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from jaxsft import grpo_hints

# names of others; the option here, the first that the command has; a note on another meaning.
_RENAMED = (
    # ---- the model ----
    (
        "model_name_or_path model_name model_id model base_model base_model_name_or_path "
        "pretrained_model_name_or_path pretrained_model model_path hf_path load_parameters_path",
        "model.path|model",
        "",
    ),
    ("model_revision revision", "model.path|model", "A revision stands behind an @: owner/name@…"),
    ("tokenizer_name tokenizer_name_or_path tokenizer_path", "model.tokenizer|tokenizer", ""),
    (
        "torch_dtype dtype bf16 use_bf16 bfloat16 mixed_precision precision fp32 compute_dtype amp",
        "model.dtype|dtype",
        "It is float32 or bfloat16.",
    ),
    ("weight_dtype param_dtype", "model.param_dtype", ""),
    (
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing "
        "enable_activation_checkpointing remat_policy gradient_checkpointing_kwargs",
        "model.remat",
        "It is none, projections or full.",
    ),
    (
        "deepspeed zero_stage fsdp_config fsdp_version ici_fsdp_parallelism fsdp_size "
        "fsdp_sharding_strategy",
        "fsdp",
        "It is the number of devices over which the frozen weights are sharded.",
    ),
    (
        "num_processes nproc_per_node num_nodes nnodes num_machines node_rank local_rank",
        "multihost",
        "The same command runs once on each host, and takes all its devices.",
    ),
    ("path", "model.path|model", "It is the base model; --data.train_files are the rows."),
    # ---- the adapter ----
    ("lora_rank rank lora_dim", "lora.r", ""),
    (
        "lora_target lora_targets lora_modules lora_attn_modules lora_target_linear module_path "
        "apply_lora_to_mlp apply_lora_to_output",
        "lora.target_modules",
        "",
    ),
    ("rslora", "lora.use_rslora", ""),
    (
        "adapter_name_or_path adapter_path lora_model_dir lora_weights lora_path peft_model_id",
        "fork_from|model",
        "",
    ),
    # ---- the rows ----
    (
        "dataset dataset_name datasets dataset_path dataset_id dataset_name_or_path dataset_dir "
        "data_path data_files data_dir train_data train_dataset train_path training_data "
        "train_dataset_path dataset_mixer",
        "data.train_files|files|prompts",
        "",
    ),
    (
        "eval_file eval_data eval_dataset eval_dataset_path eval_path validation_file test_file "
        "validation_files val_file val_files val_data val_dataset test_data test_files "
        "test_datasets",
        "data.eval_files|files",
        "",
    ),
    (
        "dataset_config dataset_config_name dataset_subset subset dataset_split split "
        "dataset_train_split",
        "data.train_files|files|prompts",
        "It stands in the name: owner/name:config/split[:1000].",
    ),
    ("dataset_test_split dataset_eval_split", "data.eval_files|files", ""),
    (
        "dataset_text_field text_field text_column prompt_column prompt_field response_column "
        "response_field completion_field input_column output_column messages_field field_messages "
        "column_mapping dataset_columns",
        "data.columns",
        "For example {prompt: task, response: text}.",
    ),
    (
        "max_samples max_train_samples num_train_samples num_samples num_examples",
        "data.stop",
        "It is the number of the first row that is not used.",
    ),
    (
        "max_seq_length max_seq_len max_sequence_length max_target_length cutoff_len sequence_len "
        "sequence_length seq_length seq_len model_max_length block_size context_length max_len",
        "data.max_length|max_length",
        "",
    ),
    ("sample_packing neat_packing packed pack pack_sequences", "data.packing", ""),
    (
        "truncation truncation_strategy truncation_mode excess_length_strategy",
        "data.overlong|overlong",
        "It is shorten, drop or raise.",
    ),
    ("system_message default_system system", "data.system_prompt|system_prompt|system", ""),
    (
        "train_on_prompt train_on_inputs train_on_input completion_only_loss assistant_only_loss "
        "mask_prompt train_on_responses_only train_on_completions_only",
        "data.loss_on_prompt",
        "Without it only answers are trained on.",
    ),
    ("dataset_prepared_path", "data.prepared_dir", ""),
    (
        "weights dataset_weights data_weights mixing_weights interleave_probs",
        "data.weights",
        "It is how often an epoch uses the samples of each file.",
    ),
    (
        "dataloader_num_workers preprocessing_num_workers dataset_num_proc num_proc workers "
        "grain_worker_count",
        "num_workers",
        "It is the number of threads that read rows ahead.",
    ),
    (
        "data_seed shuffle shuffle_seed random_state shuffle_dataset",
        "seed",
        "The rows are always shuffled, in the order that --seed gives.",
    ),
    # ---- the batch ----
    (
        "per_device_train_batch_size per_gpu_train_batch_size per_device_batch_size "
        "micro_batch_size device_train_batch_size local_batch_size batch_size_per_device "
        "train_micro_batch_size_per_gpu train_micro_batch_size mini_batch_size",
        "global_batch_size|rollout.num_prompts|batch_size|eval.batch_size",
        "It is per device × devices × gradient_accumulation_steps.",
    ),
    (
        "batch_size train_batch_size training_batch_size total_batch_size effective_batch_size bs "
        "global_batch_size",
        "global_batch_size|rollout.num_prompts|batch_size|eval.batch_size",
        "It counts the rows of an optimizer step, over all devices and micro-batches.",
    ),
    (
        "per_device_eval_batch_size per_gpu_eval_batch_size eval_micro_batch_size val_batch_size "
        "test_batch_size validation_batch_size generation_batch_size eval_per_device_batch_size",
        "eval.batch_size|batch_size",
        "It counts the rows over all devices: per device × devices.",
    ),
    (
        "gradient_accumulation grad_accum grad_accum_steps accumulate_grad_batches accum_steps "
        "accumulation_steps num_micro_batches ga_steps grad_accumulation_steps",
        "gradient_accumulation_steps",
        "--global_batch_size counts the rows of all micro-batches.",
    ),
    # ---- the optimizer ----
    (
        "lr max_lr peak_lr base_lr initial_lr max_learning_rate peak_learning_rate "
        "initial_learning_rate learning_rate_max optimizer_lr",
        "learning_rate",
        "",
    ),
    (
        "min_lr end_lr final_lr lr_end eta_min learning_rate_end final_learning_rate "
        "end_learning_rate",
        "min_learning_rate",
        "",
    ),
    (
        "min_lr_ratio min_lr_rate cosine_min_lr_ratio final_lr_ratio lr_end_ratio "
        "cosine_learning_rate_final_fraction learning_rate_final_fraction",
        "min_learning_rate",
        "It is a learning rate: the ratio × learning_rate.",
    ),
    (
        "lr_scheduler scheduler scheduler_type lr_schedule learning_rate_schedule lr_decay_style",
        "lr_scheduler_type",
        "",
    ),
    (
        "warmup_ratio warmup_fraction warmup_steps_fraction warmup_proportion lr_warmup_ratio",
        "warmup_steps",
        "It is a number of steps: the ratio × the steps of the run.",
    ),
    ("warmup num_warmup_steps lr_warmup_steps warmup_iters", "warmup_steps", ""),
    ("beta1 adam_b1 b1", "adam_beta1", ""),
    ("beta2 adam_b2 b2", "adam_beta2", ""),
    ("betas adam_betas", "adam_beta1", "--adam_beta2 is the other one."),
    ("adam_eps eps epsilon", "adam_epsilon", ""),
    ("wd decay", "weight_decay", ""),
    (
        "gradient_clipping gradient_clip_val gradient_clip grad_clip clip_grad clip_grad_norm "
        "grad_norm_clip max_gradient_norm gradient_clipping_threshold clip_norm grad_clip_norm",
        "max_grad_norm",
        "",
    ),
    # ---- how long, how often ----
    (
        "epochs num_epochs num_epoch n_epochs max_epochs train_epochs epoch num_train_epochs",
        "num_train_epochs|max_steps",
        "",
    ),
    (
        "steps num_steps max_train_steps num_train_steps train_steps total_steps training_steps "
        "num_training_steps iters max_iters num_iterations",
        "max_steps",
        "",
    ),
    ("max_time time_limit max_duration", "max_seconds", "It counts seconds."),
    (
        "log_steps log_every log_interval log_every_n_steps log_freq",
        "logging_steps",
        "",
    ),
    (
        "eval_strategy evaluation_strategy do_eval evals_per_epoch",
        "eval_steps",
        "It is a number of steps; without it, rows are measured before and after the run only.",
    ),
    (
        "eval_every eval_interval eval_freq eval_every_n_steps evaluation_steps val_interval "
        "val_check_interval validation_steps steps_per_eval eval_iters",
        "eval_steps",
        "It is a number of steps.",
    ),
    (
        "save_strategy save_every save_interval save_freq saves_per_epoch save_every_n_steps "
        "checkpoint_period checkpoint_interval checkpoint_every checkpointing_steps "
        "steps_per_checkpoint",
        "save_steps",
        "It is a number of steps.",
    ),
    (
        "max_to_keep max_checkpoints keep_last_n_checkpoints",
        "save_total_limit",
        "",
    ),
    # ---- results and answers ----
    ("run_name experiment_name exp_name", "name", "The results go to output_dir/name."),
    (
        "output_dir save_dir out_dir output_directory base_output_directory checkpoint_dir",
        "output_dir|output",
        "",
    ),
    (
        "max_tokens max_completion_length max_output_tokens max_generated_tokens max_gen_len "
        "max_response_length generation_max_length",
        "rollout.max_new_tokens|eval.max_new_tokens|max_new_tokens",
        "",
    ),
    ("temp do_sample sample greedy", "eval.temperature|temperature", "0 is greedy."),
)
# names of others; why there is no such option here.
_ABSENT = (
    (
        "model_type tokenizer_type architecture",
        "the model's own config.json says what it is",
    ),
    (
        "cache_dir dataset_cache_dir",
        "HF_HOME in the environment is where the hub's files are kept, and --data.prepared_dir "
        "where prepared rows are",
    ),
    ("trust_remote_code", "no code of a model or a data set is ever run"),
    (
        "fp16 float16 half use_fp16",
        "Gemma leaves the range of float16; --model.dtype bfloat16 takes as little memory",
    ),
    (
        "load_in_4bit load_in_8bit quantization quantization_bit quantize bits qlora use_4bit "
        "bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant quantization_config",
        "the frozen weights are float32 or bfloat16 in memory: --model.param_dtype bfloat16 is the "
        "smaller one. A .gguf file as --model.path is read and dequantised",
    ),
    (
        "attn_implementation flash_attention flash_attn flash_attn_2 use_flash_attention xformers "
        "sdp_attention attention use_liger_kernel use_liger_loss liger_kernel use_unsloth",
        "--step chooses the kernels; auto takes the fused ones on a TPU",
    ),
    ("torch_compile compile jit", "every step is compiled by XLA"),
    ("tf32 allow_tf32", "float32 is full float32; --model.dtype bfloat16 is faster"),
    (
        "device device_map use_cpu no_cuda cpu accelerator n_gpu num_gpus gpus num_devices "
        "ddp_backend ddp_timeout ddp_find_unused_parameters",
        "JAX takes all devices that it finds; JAX_PLATFORMS=cpu in the environment keeps to the "
        "CPU",
    ),
    (
        "use_peft use_lora enable_lora adapter finetuning_type tuner_type peft peft_type "
        "full_finetuning full_finetune task_type lora_task_type",
        "every run trains a LoRA adapter and nothing else; --lora.r is its rank",
    ),
    (
        "use_dora dora bias lora_bias init_lora_weights loftq_config modules_to_save rank_pattern "
        "alpha_pattern layers_to_transform lora_modules_to_save pissa_init loraplus_lr_ratio",
        "an adapter is plain LoRA: one rank, one learning rate, no biases, B begins at zero",
    ),
    (
        "val_set_size val_size test_size validation_split_percentage split_dataset_ratio "
        "validation_split eval_split_ratio",
        "held-out rows are files of their own: --data.eval_files",
    ),
    (
        "max_eval_samples num_eval_samples eval_samples",
        "the held-out loss is that of all rows in --data.eval_files; --eval.num_prompts is how "
        "many of them are answered",
    ),
    (
        "chat_template chat_template_kwargs template conversation_template prompt_template "
        "apply_chat_template",
        "rows are rendered with Gemma's own chat template; --data.answer_template is the form of "
        "answers",
    ),
    (
        "group_by_length pad_to_sequence_len pad_to_multiple_of padding padding_side padding_free "
        "dataset_padding",
        "all rows of a batch have --data.max_length tokens; --data.packing fills them",
    ),
    ("streaming", "rows are prepared once and then read from the disk"),
    (
        "auto_find_batch_size",
        "python -m jaxsft.plan --search says which batch sizes fit and how fast they are",
    ),
    (
        "optim optimizer optimizer_type optim_args opt optimizer_name use_8bit_adam adamw_8bit",
        "AdamW is the only optimizer; --adam_beta1, --adam_beta2, --adam_epsilon and "
        "--weight_decay set it",
    ),
    ("lr_scheduler_kwargs", "--warmup_steps and --min_learning_rate shape the schedule"),
    ("max_steps_per_epoch steps_per_epoch", "--max_steps counts the steps of the whole run"),
    ("neftune_noise_alpha neftune noisy_embedding_alpha", "no noise is added to embeddings"),
    ("label_smoothing label_smoothing_factor z_loss", "the loss is the plain cross-entropy"),
    (
        "early_stopping early_stopping_patience load_best_model_at_end metric_for_best_model",
        "a run goes to its end, and with --eval_steps the adapter with the lowest held-out loss is "
        "kept as well, in adapter-best/",
    ),
    (
        "report_to use_wandb wandb wandb_project wandb_entity wandb_name wandb_run_name "
        "wandb_mode logger log_with metric_logger tensorboard use_tensorboard trackers swanlab "
        "use_swanlab mlflow project_name",
        "every run writes metrics.jsonl and TensorBoard events to output_dir/name and reports to "
        "no service",
    ),
    ("logging_dir log_dir logdir tensorboard_dir", "metrics are in output_dir/name, with the rest"),
    (
        "overwrite_output_dir overwrite",
        "nothing is overwritten: choose another --name, or remove the directory",
    ),
    (
        "resume_from_checkpoint resume auto_resume auto_resume_from_checkpoints resume_from "
        "ignore_data_skip resume_training restore",
        "the same command again continues an unfinished run; --fork_from begins a new one from an "
        "adapter",
    ),
    (
        "save_only_model save_safetensors save_adapter_weights_only save_optimizer",
        "checkpoints are whole, and the adapter stands beside them as safetensors",
    ),
    (
        "merge_adapter merge_lora merge_weights save_merged merge_and_unload export_dir",
        "python -m jaxsft.export RUN --format merged merges",
    ),
    (
        "do_train do_predict stage",
        "each job has a command: jaxsft.train, jaxsft.evaluate, jaxsft.generate",
    ),
    (
        "push_to_hub hub_model_id hub_private_repo hub_strategy hub_repo upload hub_always_push",
        "nothing is uploaded; `hf upload` takes what python -m jaxsft.export writes",
    ),
    (
        "hub_token hf_token token use_auth_token auth_token",
        "the token of the hub is HF_TOKEN in the environment",
    ),
    (
        "num_beams beams repetition_penalty frequency_penalty presence_penalty min_p typical_p",
        "the sampler has temperature, top_k and top_p only",
    ),
    ("num_return_sequences num_generations", "each prompt gets one answer"),
)
# Notes on options that stand in for the first of a line of _RENAMED.
_NOTES = {
    "rollout.num_prompts": "A step learns from num_prompts × num_generations completions; "
    "--gradient_accumulation_steps divides them.",
    "max_steps": "It counts updates; prompts come again when all have had their turn.",
}
# Groups of other trainers' files that mean the whole run.
_WHOLE = {"train", "training", "trainer", "training_args", "args", "optimizer", "config", "run"}


def hint_for(name: str, options: Collection[str]) -> str:
    """What to use in place of an unknown option; "" where nothing is known or near.

    Args:
      name: as given, without dashes in front; a key of a file has dots.
      options: names of those that the command has.
    """
    name = name.lower().replace("-", "_")
    group, _, last = name.rpartition(".")
    is_eval = group.rpartition(".")[2] in ("eval", "evaluation", "validation")
    spellings = [name.replace(".", "_"), f"eval_{last}" if is_eval else last]
    of_train = _told(spellings, options, "train", _RENAMED, _ABSENT)
    of_grpo = _told(spellings, options, "grpo", grpo_hints.RENAMED, grpo_hints.ABSENT)
    near = _nearest(name, options) or (_nearest(last, options) if group in _WHOLE else "")
    near = f"did you mean --{near}?" if near else ""
    is_grpo = "rollout.num_prompts" in options
    return (of_grpo or of_train or near) if is_grpo else (of_train or near or of_grpo)


def _told(
    spellings: list[str],
    options: Collection[str],
    command: str,
    renamed: tuple[tuple[str, str, str], ...],
    absent: tuple[tuple[str, str], ...],
) -> str:
    for spelling in spellings:
        for names, option, note in renamed:
            if _is_among(spelling, names):
                return _renamed(option.split("|"), note, options, command)
        for names, why in absent:
            if _is_among(spelling, names):
                return _absent(why, options, command)
    return ""


def _is_among(name: str, names: str) -> bool:
    return any(fnmatchcase(name, each) for each in names.split())


def _renamed(targets: list[str], note: str, options: Collection[str], command: str) -> str:
    for target in targets:
        if target in options:
            # A batch of train is not one of generate.
            said = note if target == targets[0] else _NOTES.get(target, "")
            return f"did you mean --{target}? {said}".rstrip()
    return f"an option of python -m jaxsft.{command}, --{targets[0]}; this command has none"


def _absent(why: str, options: Collection[str], command: str) -> str:
    named = re.findall(r"--([\w.]+)", re.sub(r"python -m jaxsft\S+( RUN)? \S+", "", why))
    is_elsewhere = named and not any(option in options for option in named)
    return f"not here, because {why}{f' (options of jaxsft.{command})' if is_elsewhere else ''}"


def _nearest(name: str, options: Collection[str]) -> str:
    """The only option that is the name but for a typing error in each word; "" for none."""
    for is_near in (_is_same, _is_typo):
        near = {option for option in options if is_near(name, option)}
        # Without its group, as in rank for lora.rank.
        near = near or {o for o in options if "." not in name and is_near(name, o.split(".")[-1])}
        if near:
            return near.pop() if len(near) == 1 else ""
    return ""


def _is_same(name: str, option: str) -> bool:
    return re.sub(r"[._]", "", name) == re.sub(r"[._]", "", option)


def _is_typo(name: str, option: str) -> bool:
    words, others = re.split(r"[._]+", name), re.split(r"[._]+", option)
    joined, other = "".join(words), "".join(others)
    if len(words) != len(others):
        return len(joined) > 7 and _is_one_slip(joined, other)
    return all(
        word == other or (len(word) > 2 and len(other) > 2 and _is_one_slip(word, other))
        for word, other in zip(words, others, strict=True)
    )


def _is_one_slip(word: str, other: str) -> bool:
    """Is one letter too much, missing or another, or are two neighbours swapped?"""
    shorter, longer = sorted((word, other), key=len)
    if len(shorter) < len(longer):
        return any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
    apart = [i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b]
    if len(apart) == 1:
        return word[apart[0]].isalpha()  # not beta1 for beta3
    return (
        len(apart) == 2
        and apart[1] == apart[0] + 1
        and (word[apart[0]], word[apart[1]]) == (other[apart[1]], other[apart[0]])
    )
