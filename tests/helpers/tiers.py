"""Which tests take long.

`make test` leaves them out, `LONG=1 make test` runs them too, `LONG=only make test` runs them alone (docs/testing.md).
"""

import os

LONG = os.environ.get("LONG") or ("1" if os.environ.get("FULL") else "no")

EVERY = ("",)
TESTS: dict[str, tuple[str, ...]] = {
    "tests/jaxmerge/files/experts/test_mixtures.py": ("test_killed_anywhere_it_ends_with_the_same_bytes",),
    "tests/jaxmerge/files/inspect/test_lowrank.py": ("test_randomised_factors_say_what_they_explain",),
    "tests/jaxmerge/files/test_recipes.py": ("test_every_job_done_in_memory_is_the_merge_in_memory",),
    "tests/jaxmerge/files/test_resume.py": ("test_killed_anywhere_it_ends_with_the_same_bytes",),
    "tests/jaxmerge/test_order.py": ("test_on_a_mesh_without_gathering_it", "test_no_float32_copies"),
    "tests/repository/test_commands.py": ("test_the_loop", "test_merging"),
    "tests/repository/test_readme.py": ("test_the_library_in_other_peoples_loops",),
    "tests/tpu/test_aot.py": ("test_every_key_is_read",),
    "tests/train/api/test_api.py": ("test_a_model_over_devices",),
    "tests/train/api/test_docs.py": EVERY,
    "tests/train/cli/test_main.py": ("test_a_base_that_changed_under_a_run_is_noticed",),
    "tests/train/generate/test_decodings.py": ("test_each_model_turns_its_keys",),
    "tests/train/generate/test_engine.py": ("test_a_few_sizes_are_compiled", "test_slots_are_halved"),
    "tests/train/generate/test_score.py": ("test_greedy_is_what_greedy_decoding_writes",),
    "tests/train/generate/test_smollm2.py": EVERY,
    "tests/train/improve/test_branch.py": EVERY,
    "tests/train/improve/test_data_methods.py": EVERY,
    "tests/train/improve/test_gate.py": EVERY,
    "tests/train/improve/test_graft.py": EVERY,
    "tests/train/improve/test_merge.py": ("test_alpha_0_is_the_anchor_and_every_rule_moves_with_alpha",),
    "tests/train/improve/test_pairs.py": ("test_rounds_of_preference",),
    "tests/train/improve/test_policy.py": (
        "test_every_row_of_the_table_learns", "test_killed_anywhere_a_run_goes_on_and_ends_bit_identical",
    ),
    "tests/train/improve/test_probes.py": EVERY,
    "tests/train/improve/test_rehearse.py": EVERY,
    "tests/train/improve/test_rounds.py": ("test_rounds_are_told_once_though_a_run_was_stopped",),
    "tests/train/improve/test_run.py": (
        "test_killed_anywhere_a_run_goes_on_and_ends_bit_identical", "test_fine_tuning_goes_on_from_its_checkpoint",
        "test_asked_to_stop_it_saves_and_goes_on", "test_weights_that_are_lost_are_made_again",
        "test_every_method_and_probe_of_tiny",
    ),
    "tests/train/improve/test_verify.py": EVERY,
    "tests/train/learn/test_beside.py": EVERY,
    "tests/train/learn/test_beside_and_mask_rows.py": EVERY,
    "tests/train/learn/test_beside_on_mesh.py": EVERY,
    "tests/train/learn/test_distill.py": EVERY,
    "tests/train/learn/test_experts_row.py": EVERY,
    "tests/train/learn/test_lora.py": EVERY,
    "tests/train/learn/test_masks.py": EVERY,
    "tests/train/learn/test_objectives.py": EVERY,
    "tests/train/learn/test_on_policy.py": EVERY,
    "tests/train/learn/test_on_policy_distill.py": EVERY,
    "tests/train/learn/test_optim.py": EVERY,
    "tests/train/learn/test_packing.py": ("test_packed_and_unpacked_loss", "test_scalings_that_look_at"),
    "tests/train/learn/test_picks.py": ("test_losses_and_vectors_are_the_model_s",),
    "tests/train/learn/test_preferences.py": (
        "test_the_reference_is_the_model_that_is_named", "test_several_devices_train_what_one_does",
    ),
    "tests/train/learn/test_run.py": ("test_a_packed_and_mixed_run_that_is_stopped_ends_as_the_undisturbed_one",),
    "tests/train/learn/test_sft.py": (
        "test_judging_the_targets_alone_gives_the_same_sums_and_gradients", "test_the_held_out_loss",
        "test_training_drives_32_examples_under_a_twentieth", "test_what_decays",
    ),
    "tests/train/learn/test_sft_settings.py": EVERY,
    "tests/train/learn/test_shared.py": EVERY,
    "tests/train/learn/test_shared_pairs.py": ("test_a_sequence_without_a_gradient_needs_no_backward_pass",),
    "tests/train/learn/test_signed.py": EVERY,
    "tests/train/learn/test_stay.py": EVERY,
    "tests/train/models/test_branches.py": EVERY,
    "tests/train/models/test_divergence.py": ("test_the_penalty_of_fine_tuning",),
    "tests/train/models/test_families.py": (
        "test_greedy_decoding_equals_whole_passes", "test_padding_does_not_lengthen_a_sequence",
        "test_every_tensor_changes_the_logits",
    ),
    "tests/train/models/test_fused.py": ("test_tiles_are_the_plain_attention",),
    "tests/train/models/test_loss.py": ("test_computing_again_changes_nothing_and_keeps_less",),
    "tests/train/models/test_smollm2.py": EVERY,
    "tests/train/models/test_stacked.py": EVERY,
    "tests/train/report/test_watching.py": ("test_pictures_are_kept_apart", "test_every_prefix_of_a_run"),
    "tests/train/runtime/test_mesh.py": (
        "test_sampling_gives_the_same_tokens", "test_the_memory_of_a_device_falls_as_the_mesh_grows",
        "test_fine_tuning_gives_the_same_losses", "test_the_step_gathers_weights_and_never_activations",
        "test_decoding_leaves_the_caches_where_they_are", "test_accumulation_on_a_mesh_gives_the_same_losses",
    ),
    "tests/train/runtime/test_mesh_experts.py": EVERY,
    "tests/train/runtime/test_processes.py": EVERY,
    "tests/train/search/test_run.py": EVERY,
    "tests/train/studies/test_analyse.py": EVERY,
    "tests/train/studies/test_statistics.py": EVERY,
    "tests/train/studies/test_sweep.py": ("test_a_real_sweep_of_two_runs", "test_pretraining_left_out"),
    "tests/train/studies/test_tune.py": (
        "test_the_command_finds", "test_a_search_that_was_stopped", "test_the_gradient_is_that", "test_accuracy_is_of",
        "test_frank_wolfe_mixes",
    ),
    "tests/train/tasks/test_code.py": ("test_codeio_does_not_depend_on_the_hash_seed",),
    "tests/train/tasks/test_suite.py": ("test_suites_do_not_depend_on_the_hash_seed",),
}  # fmt: skip
"""By file, how the names of long tests begin."""

RULES = {
    "interpolate", "linear", "average", "slerp", "karcher", "ties", "dare", "dare_ties", "della", "sce", "model_stock",
    "regmean", "tsvm",
}  # fmt: skip
"""Of each kind of arithmetic a rule, under its name in the library or in recipes: elementwise, norms and angles,
iterations, selection by size alone and with signs, by chance, by variance, over all models, solves, singular values."""
MODELS = {"llama", "mistral", "qwen3", "gemma3", "phi3_long"}
"""Families that differ from each other in what a decoder does."""
KINDS: dict[str, tuple[str, set[str]]] = {
    "tests/jaxmerge/files/test_files.py": ("method", RULES),
    "tests/jaxmerge/test_contract.py": ("name", RULES),
    "tests/jaxmerge/test_formulas.py": ("rule", RULES),
    "tests/repository/test_methods.py": ("method", RULES),
    "tests/train/models/test_families.py": ("name", MODELS),
}
"""By file, a parameter of its tests, and the values with which they are not long."""


def is_wanted(long: bool) -> bool:
    """Whether a test is run that takes long, or does not."""
    return long if LONG == "only" else LONG != "no" or not long


def is_long(path: str, name: str, params: dict[str, object]) -> bool:
    """Whether the test `name` of a file, without what stands in brackets, with these parameters takes long."""
    if any(name.startswith(start) for start in TESTS.get(path, ())):
        return True
    parameter, short = KINDS.get(path, ("", set()))
    return parameter in params and params[parameter] not in short
