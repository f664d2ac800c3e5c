"""Options of other GRPO trainers, as in `hints`: TRL's GRPOConfig, Tunix, verl. They go first in
`python -m jaxsft.grpo`, and last elsewhere. A * stands for any letters."""

RENAMED = (
    ("num_generations group_size rollout_n generations_per_prompt", "rollout.num_generations", ""),
    ("num_prompts prompts_per_step num_prompts_per_step", "rollout.num_prompts", ""),
    (
        "total_generation_steps max_tokens_to_generate response_length max_new_tokens",
        "rollout.max_new_tokens",
        "--eval.max_new_tokens is that of held-out answers.",
    ),
    (
        "max_prompt_length prompt_length",
        "data.max_length",
        "A prompt and its completion have room in it, or the prompt is left out.",
    ),
    (
        "rollout_micro_batch_size rollout_batch_size micro_rollout_batch_size",
        "rollout.batch_size",
        "It counts the completions that are drawn at once.",
    ),
    (
        "compute_logps_micro_batch_size log_prob_micro_batch_size",
        "gradient_accumulation_steps",
        "Log-probabilities are computed in the micro-batches of the update.",
    ),
    (
        "loss_type loss_algo loss_agg_mode algo_variant policy_loss_fn loss_mode",
        "objective.loss_type",
        "It is grpo, dapo or dr_grpo.",
    ),
    (
        "scale_rewards advantage_estimator norm_adv_by_std_in_grpo whiten_advantages",
        "objective.scale_rewards",
        "It is none, group or batch; an advantage is the reward minus its group's mean.",
    ),
    (
        "epsilon epsilon_low clip_epsilon clip_eps clip_range cliprange clip_ratio clip_ratio_low",
        "objective.epsilon",
        "--adam_epsilon is Adam's.",
    ),
    ("epsilon_high clip_ratio_high clip_eps_high", "objective.epsilon_high", ""),
    (
        "beta kl_coef kl_coeff kl_beta kl_loss_coef init_kl_coef kl_weight use_kl_loss",
        "objective.beta",
        "It is the weight of the KL to the run's start.",
    ),
    (
        "use_bias_correction_kl kl_loss_mode kl_loss_type kl_estimator",
        "objective.use_bias_correction_kl",
        "The estimate is k3, with or without the ratio.",
    ),
    (
        "num_iterations ppo_epochs num_ppo_epochs updates_per_rollout num_policy_updates mu",
        "objective.num_iterations",
        "",
    ),
    ("mask_truncated_completions overlong_filter*", "objective.mask_truncated_completions", ""),
    (
        "reward_funcs reward_fns reward_fn reward_functions reward_function reward_weights "
        "custom_reward_function*",
        "rewards",
        "It has names and weights: {format: 0.2, my_rewards.py:brevity: 1.0}.",
    ),
)
ABSENT = (
    (
        "temperature top_k top_p min_p typical_p repetition_penalty generation_kwargs",
        "completions are drawn from the whole softmax at temperature 1, or every ratio of the "
        "objective would be wrong; --eval.temperature, --eval.top_k and --eval.top_p are those of "
        "held-out answers",
    ),
    (
        "generation_batch_size steps_per_generation",
        "a rollout has --rollout.num_prompts × --rollout.num_generations completions and serves "
        "--objective.num_iterations updates",
    ),
    ("num_generations_eval", "a held-out prompt gets one answer; --eval.num_prompts have one"),
    (
        "use_vllm vllm_* sglang_* rollout_engine inference_engine cache_implementation "
        "use_transformers_* transformers_continuous_* ds3_gather_for_generation kv_cache_size "
        "gpu_memory_utilization",
        "this program draws completions itself, from the weights that it trains; "
        "--rollout.batch_size is how many at once",
    ),
    (
        "use_rollout_logps off_policy_mask_threshold off_policy_steps max_concurrency",
        "a rollout is drawn from the adapter that is trained on it next; there are no stale ones",
    ),
    (
        "delta sapo_* vespo_* importance_sampling_level",
        "--objective.loss_type is grpo, dapo or dr_grpo, with a ratio for each token that "
        "--objective.epsilon and --objective.epsilon_high clip",
    ),
    (
        "sync_ref_model ref_model_* ref_model reference_model force_compute_kl",
        "the reference is the adapter that the run began with; --objective.beta 0 needs none",
    ),
    (
        "top_entropy_quantile use_adaptive_entropy entropy_*",
        "entropy is measured and shown, and is in no loss; --objective.epsilon_high above "
        "--objective.epsilon keeps it up",
    ),
    (
        "multi_objective_aggregation reward_manager",
        "a completion's reward is the sum of its rewards, each times its weight in --rewards",
    ),
    (
        "reward_model_name_or_path reward_model* reward_processing_classes",
        "a reward is built in, or a function in a Python file of yours: --rewards",
    ),
    (
        "max_tool_calling_iterations tools environment_factory max_turns",
        "a completion is one turn, without tools",
    ),
    (
        "log_completions num_completions_to_print log_unique_prompts wandb_log_unique_prompts "
        "log_completions_hub_repo log_multimodal",
        "every completion is in the run's rollouts.jsonl, and --page makes a page of them",
    ),
    ("disable_dropout", "there is none while sampling, so --lora.dropout must be 0"),
    (
        "packing data_packing sample_packing pad_to_multiple_of padding padding_side padding_free",
        "completions are always packed, into rows of --data.max_length tokens",
    ),
    ("remove_unused_columns", "a reward of yours gets the whole row"),
    ("router_aux_loss_coef cast_lm_head_to_fp32", "Gemma has no router, and log p is float32"),
    ("model_init_kwargs", "--model.path, --model.dtype and --model.param_dtype are all there is"),
)
