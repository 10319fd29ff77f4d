//! Work and rules: computed for every known model, growing with what is asked; the nearest that a model can make.
#![allow(clippy::unwrap_used, missing_docs)]

use kinoflock_protocol::model::ModelRules;
use kinoflock_protocol::work::{JobShape, LtxConfig, Work, WorkModel, work};
use kinoflock_protocol::{Micro, Millis};
use proptest::prelude::*;

fn motif() -> WorkModel {
    WorkModel::ltx(&LtxConfig {
        layers: 8,
        heads: 6,
        head_dim: 64,
        cross_dim: 384,
        channels: 32,
        text_tokens: 24,
        text_parameters: 1_000_000,
        spatial: 16,
        temporal: 8,
        decoder: &[(32, 2), (64, 2), (128, 2)],
        vae_patch: 2,
    })
}

/// Every model with its rules: size multiple, frame multiple, frame offset.
fn models() -> Vec<(&'static str, WorkModel, ModelRules)> {
    let rules = |size_multiple, frames_multiple| ModelRules {
        size_multiple,
        frames_multiple,
        frames_offset: 1,
        max_prompt_tokens: 128,
    };
    vec![
        ("motif", motif(), rules(16, 8)),
        ("ltx 2b", WorkModel::ltx_2b(), rules(32, 8)),
        ("ltx 2b 0.9.1", WorkModel::ltx_2b_091(), rules(32, 8)),
        ("ltx 2b 0.9.5", WorkModel::ltx_2b_095(), rules(32, 8)),
        ("ltx 13b", WorkModel::ltx_13b(), rules(32, 8)),
        ("cogvideox 2b", WorkModel::cogvideox_2b(), rules(16, 4)),
        ("cogvideox 5b", WorkModel::cogvideox_5b(), rules(16, 4)),
        ("cogvideox 1.5 5b", WorkModel::cogvideox_15_5b(), rules(16, 4)),
        ("mochi 1", WorkModel::mochi_1(), rules(16, 6)),
        ("pyramid flow", WorkModel::pyramid_flow_miniflux(), rules(64, 8)),
        ("wan 1.3b", WorkModel::wan_1_3b(), rules(16, 4)),
        ("wan 14b", WorkModel::wan_14b(), rules(16, 4)),
    ]
}

fn shape(frames: u32, width: u32, height: u32, steps: u32) -> JobShape {
    JobShape { frames, width, height, steps, guided: true }
}

#[test]
fn work_grows_strictly_in_frames_size_steps_and_guidance_for_every_model() {
    for (name, model, rules) in models() {
        let (f, m) = (rules.frames_multiple, rules.size_multiple);
        for k in 0..30 {
            for (w, h) in [(1, 1), (2, 3), (12, 8), (40, 22)] {
                for steps in [1, 2, 8, 50] {
                    let here = shape(f * k + 1, w * m, h * m, steps);
                    let cost = work(&model, &here);
                    let grown = [
                        JobShape { frames: here.frames + f, ..here },
                        JobShape { frames: here.frames + 1, ..here },
                        JobShape { width: here.width + m, ..here },
                        JobShape { height: here.height + m, ..here },
                        JobShape { steps: steps + 1, ..here },
                    ];
                    for more in grown {
                        assert!(work(&model, &more) > cost, "{name}: {more:?} costs no more than {here:?}");
                    }
                    assert!(
                        work(&model, &JobShape { guided: false, ..here }) < cost,
                        "{name}: guidance is free"
                    );
                }
            }
        }
    }
}

#[test]
fn a_model_that_works_in_stages_has_more_passes_than_steps() {
    for (name, model, _) in models() {
        let staged = name == "pyramid flow";
        assert_eq!(model.counts_by_steps(), !staged, "{name}");
        let passes = [1, 121, u32::MAX].map(|frames| model.passes(frames));
        let most = (u32::MAX / 8 + 1) * 3;
        assert_eq!(passes, if staged { [3, 48, most] } else { [1; 3] }, "{name}");
    }
}

#[test]
fn attention_is_quadratic_in_tokens() {
    let model = WorkModel::ltx_2b();
    let ratio = |scale: u32| {
        let one = work(&model, &shape(97, 512 * scale, 512 * scale, 40)).0 as f64;
        work(&model, &shape(97, 1024 * scale, 1024 * scale, 40)).0 as f64 / one
    };
    assert!(ratio(1) > 4.0, "four times the tokens cost more than four times as much: {}", ratio(1));
    assert!(ratio(8) > 12.0, "at great sizes attention rules: {}", ratio(8));
}

#[test]
fn known_models_cost_about_twice_their_parameters_for_each_token() {
    // 2 FLOP a parameter and token, plus attention: a check of the figures against the published sizes.
    for (name, model, parameters, tokens_of) in [
        ("ltx 2b", WorkModel::ltx_2b(), 1.923e9, (9u32, 64u32, 64u32, 2.0 * 4.0)),
        ("ltx 13b", WorkModel::ltx_13b(), 13.04e9, (9, 64, 64, 2.0 * 4.0)),
    ] {
        let (frames, width, height, tokens) = tokens_of;
        let one = |steps| {
            work(&model, &JobShape { guided: false, ..shape(frames, width, height, steps) }).0 as f64 * 1e6
        };
        let per_step = one(11) - one(10);
        // The text side (keys and values) is not per video token; leave room for it.
        let least = 2.0 * parameters * 0.7 * tokens;
        assert!(
            per_step > least && per_step < least * 8.0,
            "{name}: {per_step:e} for one step, {least:e} at least"
        );
    }
}

proptest! {
    #[test]
    fn no_job_and_no_model_overflows(figures in any::<[u32; 16]>(), guided in any::<bool>(), parameters in any::<u64>()) {
        let [layers, heads, head_dim, cross_dim, channels, text_tokens, spatial, temporal, a, b, vae_patch, f, w, h, s, p] = figures;
        let decoder = [(a, b / 2), (b, a / 2), (p, 3)];
        let config = LtxConfig {
            layers, heads, head_dim, cross_dim, channels, text_tokens, text_parameters: parameters, spatial, temporal,
            decoder: &decoder, vae_patch,
        };
        let mut model = WorkModel::ltx(&config);
        let shape = JobShape { frames: f, width: w, height: h, steps: s, guided };
        work(&model, &shape);
        for (_, known, _) in models() {
            work(&known, &shape);
            model.schedule = known.schedule;
            model.transformer.attention = known.transformer.attention;
            model.transformer.single_layers = p;
            model.transformer.patch_side = p;
            model.transformer.patch_frames = a;
            work(&model, &shape);
        }
    }

    #[test]
    fn whatever_is_asked_the_nearest_can_be_made(
        frames in any::<u32>(), width in any::<u32>(), height in any::<u32>(),
        size_multiple in 0..100u32, frames_multiple in 0..20u32, frames_offset in 0..4u32,
    ) {
        let rules = ModelRules { size_multiple, frames_multiple, frames_offset, max_prompt_tokens: 1 };
        let nearest_frames = rules.nearest_frames(frames);
        let nearest_sizes = rules.nearest_sizes(width, height);
        prop_assert!(!nearest_frames.is_empty() && !nearest_sizes.is_empty());
        for frames in &nearest_frames {
            for (w, h) in &nearest_sizes {
                prop_assert_eq!(rules.check(*frames, *w, *h), Ok(()));
            }
        }
        if rules.check(frames, width, height).is_ok() {
            prop_assert_eq!(nearest_frames, [frames]);
            prop_assert_eq!(nearest_sizes, [(width, height)]);
        }
    }
}

#[test]
fn a_refused_size_names_the_nearest_that_can_be_made() {
    let rules =
        ModelRules { size_multiple: 32, frames_multiple: 8, frames_offset: 1, max_prompt_tokens: 128 };
    let text = |frames, width, height| rules.check(frames, width, height).unwrap_err().to_string();
    assert_eq!(
        text(17, 17, 64),
        "17x64: width 17 is not a multiple of 32; the nearest this model can make is 32x64"
    );
    assert_eq!(
        text(17, 50, 64),
        "50x64: width 50 is not a multiple of 32; the nearest this model can make are 64x64 and 32x64"
    );
    assert_eq!(
        text(17, 64, 0),
        "64x0: height 0 is not a multiple of 32; the nearest this model can make is 64x32"
    );
    assert_eq!(
        text(20, 64, 64),
        "20 frames: this model makes 8k+1 frames; the nearest it can make are 17 and 25"
    );
    assert_eq!(text(0, 64, 64), "0 frames: this model makes 8k+1 frames; the nearest it can make is 1");
    let prompt = rules.check_prompt(140).unwrap_err().to_string();
    assert_eq!(prompt, "prompt of 140 tokens exceeds the limit of 128; the last 12 tokens would be cut");
}

#[test]
fn work_is_shown_in_tflop_and_as_time() {
    let cost = Work(1_234_567);
    assert_eq!(cost.to_string(), "1.234 TFLOP");
    assert_eq!(cost.millis_at(1_000_000), Millis(1234));
    assert_eq!(cost.millis_at(0), Millis(u64::MAX));
    assert_eq!(Work(1000).speed(Millis(0)), 1_000_000);
    assert_eq!(cost.share(1, 2), Work(617_283));
    assert_eq!(Micro::ONE.to_f64(), 1.0);
}
