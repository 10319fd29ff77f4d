//! Latent space, open, for every family of models: what comes back can be given back, and goes on bit for bit; what is
//! changed inside a run does what it says; what has no meaning is refused with the limit.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use kinoflock_inference::pipeline::touch::{
    Channels, FINAL, Keep, NOISE, NoiseMix, PromptMix, Route, Start, Touch, Way, memory_prefix, mix,
    step_name,
};
use kinoflock_inference::{
    Checkpoint, DecodeOptions, Error, GenerateRequest, Generated, LoadOptions, Observer, Pipeline,
    SecondPass, Silent, Tensor, load,
};

/// A golden folder and a small clip that it makes.
struct Family {
    folder: &'static str,
    size: (usize, usize),
    frames: usize,
    steps: usize,
    /// Whether a run may begin with finished latents under noise.
    second: bool,
}

const fn family(folder: &'static str, size: (usize, usize), frames: usize, steps: usize) -> Family {
    Family { folder, size, frames, steps, second: true }
}

const FAMILIES: [Family; 7] = [
    family("ltx-video-0.9.0", (96, 32), 9, 4),
    family("ltx-video-0.9.5", (64, 32), 9, 4),
    family("cogvideox-2b", (64, 48), 9, 4),
    // A sampler with a memory and noise in every step.
    family("cogvideox-5b", (48, 32), 9, 4),
    family("mochi-1", (32, 48), 7, 4),
    // A sampler of several steps.
    family("wan2.1", (48, 32), 9, 4),
    Family { second: false, ..family("pyramid-flow-miniflux", (64, 64), 17, 1) },
];

fn open(family: &Family) -> Box<dyn Pipeline> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(family.folder);
    load(&folder.join("pipeline"), &LoadOptions::default()).unwrap()
}

fn request(family: &Family, pipeline: &dyn Pipeline) -> GenerateRequest {
    GenerateRequest {
        width: family.size.0,
        height: family.size.1,
        frames: family.frames,
        steps: family.steps,
        seed: 7,
        guidance: 3.0,
        negative_prompt: "cold fog".to_owned(),
        ..GenerateRequest::new("a red dog", &pipeline.info().defaults)
    }
}

fn touched(request: &GenerateRequest, touch: Touch) -> GenerateRequest {
    GenerateRequest { touch, ..request.clone() }
}

/// The same without frames.
fn latents_only(request: &GenerateRequest) -> GenerateRequest {
    GenerateRequest { decode: DecodeOptions { skip: true, ..request.decode }, ..request.clone() }
}

fn make(pipeline: &mut dyn Pipeline, request: &GenerateRequest) -> Generated {
    pipeline.generate(request, &mut Silent).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|value| value.to_bits()).collect()
}

/// The latents after so many steps, as a run is begun with them.
fn start(kept: &BTreeMap<String, Tensor>, done: usize) -> Start {
    let prefix = memory_prefix(done);
    let memory = kept
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_owned(), tensor.clone())));
    Start { done, latents: kept[&step_name(done)].clone(), memory: memory.collect() }
}

#[derive(Default)]
struct Checkpoints(Vec<Checkpoint>);

impl Observer for Checkpoints {
    fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.0.push(checkpoint.clone());
    }
}

#[test]
fn what_comes_back_can_be_given_back_and_goes_on_bit_for_bit() {
    for family in &FAMILIES {
        let (name, mut pipeline) = (family.folder, open(family));
        let plain = request(family, &*pipeline);
        let without = make(&mut *pipeline, &plain);
        let steps = without.step_hashes.len();
        let keep = Keep { noise: true, steps: (1..=steps).collect() };
        let all = touched(&plain, Touch { keep, ..Touch::default() });
        let whole = make(&mut *pipeline, &all);
        assert_eq!(whole.step_hashes, without.step_hashes, "{name}: to give latents back changes them");
        assert_eq!(whole.frames, without.frames, "{name}");
        assert!(without.kept.is_empty() && !whole.kept.contains_key(FINAL));

        let noise = Some(whole.kept[NOISE].clone());
        let from_noise = GenerateRequest { initial_latents: noise, seed: 99, ..latents_only(&plain) };
        let again = make(&mut *pipeline, &from_noise);
        // Where steps draw noise of their own, that is the seed's.
        let same_seed = make(&mut *pipeline, &GenerateRequest { seed: plain.seed, ..from_noise });
        assert_eq!(again.start_hash, whole.start_hash, "{name}");
        assert_eq!(same_seed.step_hashes, whole.step_hashes, "{name}");

        for done in [1, steps / 2, steps - 1] {
            let touch = Touch { start: Some(start(&whole.kept, done)), ..Touch::default() };
            let rest = make(&mut *pipeline, &latents_only(&touched(&plain, touch)));
            assert_eq!(bits(&rest.latents), bits(&whole.latents), "{name}: from step {done} of {steps}");
            assert_eq!(rest.steps_done, steps - done, "{name}");
            assert_eq!(rest.step_hashes[done..], whole.step_hashes[done..], "{name}");
            assert_eq!(rest.step_hashes.len(), steps, "{name}");
            assert_eq!(rest.start_hash, whole.step_hashes[done - 1], "{name}");
        }

        let touch = Touch { decode_only: Some(whole.latents.clone()), ..Touch::default() };
        // Neither words nor pictures matter to it.
        let decode = GenerateRequest { prompt: "x".repeat(5000), steps: 1, ..touched(&plain, touch) };
        let decoded = make(&mut *pipeline, &decode);
        assert_eq!(decoded.frames, whole.frames, "{name}");
        assert_eq!((decoded.steps_done, decoded.step_hashes.len()), (0, 0), "{name}");
    }
}

#[test]
fn a_resumed_run_brings_back_what_its_first_part_was_asked_for() {
    for family in &FAMILIES {
        let mut pipeline = open(family);
        let keep = Keep { noise: false, steps: BTreeSet::from([1, 3]) };
        let request = GenerateRequest {
            checkpoint_every: 2,
            ..latents_only(&touched(&request(family, &*pipeline), Touch { keep, ..Touch::default() }))
        };
        let mut seen = Checkpoints::default();
        let whole = pipeline.generate(&request, &mut seen).unwrap();
        let left = Checkpoint::from_bytes(&seen.0[0].to_bytes().unwrap()).unwrap();
        assert_eq!(left.steps_done, 2);
        let rest = make(&mut *pipeline, &GenerateRequest { resume: Some(left), ..request });
        assert_eq!(rest.kept.keys().collect::<Vec<_>>(), whole.kept.keys().collect::<Vec<_>>());
        assert!(
            rest.kept.iter().all(|(name, tensor)| bits(tensor) == bits(&whole.kept[name])),
            "{}",
            family.folder
        );
    }
}

#[test]
fn guidance_follows_its_curve_step_by_step() {
    for family in &FAMILIES {
        let (name, mut pipeline) = (family.folder, open(family));
        let mut plain = latents_only(&request(family, &*pipeline));
        // One guidance for every part of a clip that is made part by part.
        plain.later_guidance = Some(plain.guidance);
        let whole = make(&mut *pipeline, &plain);
        let steps = whole.step_hashes.len();
        let mut with = |curve: &[f64]| {
            let touch = Touch { guidance: curve.to_vec(), ..Touch::default() };
            make(&mut *pipeline, &touched(&plain, touch)).step_hashes
        };
        assert_eq!(with(&[3.0]), whole.step_hashes, "{name}: a constant curve");
        assert_eq!(with(&[3.0, 3.0]), whole.step_hashes, "{name}: a line that does not fall");
        let mut last = vec![3.0; steps];
        last[steps - 1] = -1.5;
        let changed = with(&last);
        assert_eq!(changed[..steps - 1], whole.step_hashes[..steps - 1], "{name}");
        assert_ne!(changed[steps - 1], whole.step_hashes[steps - 1], "{name}");
        let unguided = GenerateRequest { guidance: 1.0, later_guidance: None, ..plain.clone() };
        let none = with(&[1.0]);
        assert_eq!(none, make(&mut *pipeline, &unguided).step_hashes, "{name}: a curve of 1");
    }
}

#[test]
fn blocks_are_left_out_and_computed_again() {
    for family in &FAMILIES {
        let (name, mut pipeline) = (family.folder, open(family));
        let layers = pipeline.info().work.layers;
        let plain = latents_only(&request(family, &*pipeline));
        let whole = make(&mut *pipeline, &plain);
        let mut with = |skip: Vec<usize>, repeat: Vec<usize>| {
            let touch = Touch { route: Route { skip, repeat }, ..Touch::default() };
            make(&mut *pipeline, &touched(&plain, touch)).step_hashes[0]
        };
        assert_eq!(with(vec![], vec![]), whole.step_hashes[0], "{name}");
        let mut seen = BTreeSet::from([whole.step_hashes[0]]);
        for block in 0..layers {
            assert!(seen.insert(with(vec![block], vec![])), "{name}: without block {block}");
            assert!(seen.insert(with(vec![], vec![block])), "{name}: with block {block} twice");
        }
        assert!(seen.insert(with((0..layers).collect(), vec![])) || layers == 1, "{name}: without all");
        assert!(seen.insert(with(vec![], vec![0; layers])) || layers == 1, "{name}: one again and again");
    }
}

#[test]
fn channels_are_permuted_scaled_and_shifted_and_back() {
    for family in &FAMILIES {
        let (name, mut pipeline) = (family.folder, open(family));
        let count = pipeline.info().work.latent_channels;
        let plain = request(family, &*pipeline);
        let whole = make(&mut *pipeline, &plain);
        let turned = |by: usize| (0..count).map(|channel| (channel + by) % count).collect::<Vec<_>>();
        let there = Channels { permute: turned(1), scale: vec![-2.0], ..Channels::default() };
        let touch = Touch { channels: there, ..Touch::default() };
        let changed = make(&mut *pipeline, &touched(&plain, touch));
        assert_eq!(changed.step_hashes, whole.step_hashes, "{name}: the steps know nothing of it");
        assert_ne!(changed.frames, whole.frames, "{name}");
        let channel = |latents: &Tensor, index| bits(&latents.narrow(1, index, 1).unwrap());
        let first = (whole.latents.narrow(1, 1, 1).unwrap() * -2.0).unwrap();
        assert_eq!(channel(&changed.latents, 0), bits(&first), "{name}");

        let back = Channels { permute: turned(count - 1), scale: vec![-0.5; count], ..Channels::default() };
        let touch = Touch { decode_only: Some(changed.latents), channels: back, ..Touch::default() };
        let decoded = make(&mut *pipeline, &touched(&plain, touch));
        assert_eq!(decoded.frames, whole.frames, "{name}: there and back");
        assert_eq!(bits(&decoded.latents), bits(&whole.latents), "{name}");

        // Within the run, from the step on after which it is done.
        for after in [0, 1] {
            let channels = Channels { shift: vec![0.5], after: Some(after), ..Channels::default() };
            let within = latents_only(&touched(&plain, Touch { channels, ..Touch::default() }));
            let changed = make(&mut *pipeline, &within);
            // Latents that are made part by part begin anew with each.
            for step in [1, whole.step_hashes.len()] {
                assert_ne!(
                    changed.step_hashes[step - 1],
                    whole.step_hashes[step - 1],
                    "{name} after {after}"
                );
            }
            assert_eq!(changed.start_hash != whole.start_hash, after == 0, "{name}");
            let resumable = GenerateRequest { checkpoint_every: 1, ..within };
            let mut seen = Checkpoints::default();
            pipeline.generate(&resumable, &mut seen).unwrap();
            let resume = seen.0.first().cloned();
            let rest = make(&mut *pipeline, &GenerateRequest { resume, ..resumable });
            assert_eq!(rest.step_hashes, changed.step_hashes, "{name}: resumed");
        }
    }
}

#[test]
fn two_seeds_and_two_prompts_are_mixed_and_are_themselves_at_the_ends() {
    for family in &FAMILIES {
        let (name, mut pipeline) = (family.folder, open(family));
        let plain = latents_only(&request(family, &*pipeline));
        let mut of = |request: &GenerateRequest| make(&mut *pipeline, request);
        let other_seed = of(&GenerateRequest { seed: 8, ..plain.clone() });
        let other_prompt =
            of(&GenerateRequest { prompt: "slow green rain over a hill".to_owned(), ..plain.clone() });
        let whole = of(&plain);
        for way in [Way::Line, Way::Sphere] {
            let mut seed = |weight| {
                let noise = Some(NoiseMix { seed: 8, weight, way });
                let keep = Keep { noise: true, ..Keep::default() };
                of(&touched(&plain, Touch { noise, keep, ..Touch::default() }))
            };
            assert_eq!(seed(0.0).step_hashes, whole.step_hashes, "{name}");
            assert_eq!(seed(1.0).start_hash, other_seed.start_hash, "{name}");
            let (first, second) = (seed(0.0).kept[NOISE].clone(), seed(1.0).kept[NOISE].clone());
            let between = mix(&first, &second, 0.3, way).unwrap();
            assert_eq!(bits(&seed(0.3).kept[NOISE]), bits(&between), "{name}: noise between two seeds");
            let mut prompt = |weight| {
                let prompt =
                    Some(PromptMix { prompt: "slow green rain over a hill".to_owned(), weight, way });
                of(&touched(&plain, Touch { prompt, ..Touch::default() })).step_hashes
            };
            assert_eq!(prompt(0.0), whole.step_hashes, "{name}");
            assert_eq!(prompt(1.0), other_prompt.step_hashes, "{name}");
            let between = prompt(0.5);
            assert!(
                between[0] != whole.step_hashes[0] && between[0] != other_prompt.step_hashes[0],
                "{name}"
            );
        }
    }
}

#[test]
fn a_run_goes_on_from_finished_latents_in_every_family_that_can() {
    for family in &FAMILIES {
        let (name, mut pipeline) = (family.folder, open(family));
        let plain = latents_only(&request(family, &*pipeline));
        let clean = make(&mut *pipeline, &plain).latents;
        let second = |strength| GenerateRequest {
            initial_latents: Some(clean.clone()),
            second_pass: Some(SecondPass::new(strength)),
            checkpoint_every: 1,
            seed: 8,
            ..plain.clone()
        };
        if !family.second {
            let text = pipeline.check(&second(0.5)).unwrap_err().to_string();
            assert!(text.contains("makes no second pass"), "{name}: {text}");
            continue;
        }
        let far = |made: &Generated| {
            let off = (&made.latents - &clean).unwrap().sqr().unwrap().mean_all().unwrap();
            off.to_scalar::<f32>().unwrap()
        };
        let mut seen = Checkpoints::default();
        let half = pipeline.generate(&second(0.5), &mut seen).unwrap();
        let much = make(&mut *pipeline, &second(1.0));
        assert_eq!((half.steps_done, much.steps_done), (2, 4), "{name}");
        assert!(far(&half) < far(&much), "{name}: {} {}", far(&half), far(&much));
        let resume = seen.0.first().cloned();
        let rest = make(&mut *pipeline, &GenerateRequest { resume, ..second(0.5) });
        assert_eq!(rest.step_hashes, half.step_hashes, "{name}");
        let error = pipeline.check(&GenerateRequest { initial_latents: None, ..second(0.5) }).unwrap_err();
        assert!(error.to_string().contains("none were given"), "{name}: {error}");
        let start = pipeline.start(&second(0.5)).unwrap();
        assert_eq!(
            pipeline.transition(&second(0.5), 0, &start).unwrap_err().code(),
            "not_auditable",
            "{name}"
        );
    }
}

#[test]
fn steps_are_audited_as_they_were_made_unless_they_are_reached_into() {
    let family = &FAMILIES[0];
    let mut pipeline = open(family);
    let plain = latents_only(&request(family, &*pipeline));
    let layers = pipeline.info().work.layers;
    let touch = Touch {
        keep: Keep { noise: true, steps: (1..=4).collect() },
        guidance: vec![6.0, 0.5],
        route: Route { skip: vec![], repeat: vec![layers - 1] },
        channels: Channels { scale: vec![0.5], after: Some(0), ..Channels::default() },
        prompt: Some(PromptMix { prompt: "rain".to_owned(), weight: 0.4, way: Way::Line }),
        noise: Some(NoiseMix { seed: 3, weight: 0.5, way: Way::Sphere }),
        ..Touch::default()
    };
    let request = touched(&plain, touch.clone());
    let made = make(&mut *pipeline, &request);
    for index in 1..4 {
        let before = &made.kept[&step_name(index)];
        let here = pipeline.transition(&request, index, before).unwrap();
        assert!(here.deviation(before, &made.kept[&step_name(index + 1)]).unwrap() < 1e-5);
    }
    assert_eq!(*blake3::hash(&latents_bytes(&pipeline.start(&request).unwrap())).as_bytes(), made.start_hash);
    let plainly = pipeline.commitment(&plain).unwrap().conditioning;
    assert_ne!(pipeline.commitment(&request).unwrap().conditioning, plainly);
    let keep = Touch { keep: touch.keep.clone(), ..Touch::default() };
    assert_eq!(pipeline.commitment(&touched(&plain, keep)).unwrap().conditioning, plainly);

    let channels = Channels { scale: vec![0.5], after: Some(2), ..Channels::default() };
    let start = start(&made.kept, 2);
    for touch in [Touch { channels, ..Touch::default() }, Touch { start: Some(start), ..Touch::default() }] {
        let request = touched(&plain, touch);
        let error = pipeline.transition(&request, 1, &made.kept[&step_name(1)]).unwrap_err();
        assert_eq!(error.code(), "not_auditable");
    }
}

fn latents_bytes(tensor: &Tensor) -> Vec<u8> {
    kinoflock_inference::sampler::checkpoint::latents_bytes(tensor).unwrap()
}

#[test]
fn what_has_no_meaning_is_refused_with_the_limit() {
    let family = &FAMILIES[0];
    let pipeline = open(family);
    let plain = request(family, &*pipeline);
    let (layers, channels) = (pipeline.info().work.layers, pipeline.info().work.latent_channels);
    let zeros = |shape: &[usize]| {
        Tensor::zeros(shape, kinoflock_inference::DType::F32, &kinoflock_inference::Device::Cpu).unwrap()
    };
    let refused = |touch: Touch| -> Error { pipeline.check(&touched(&plain, touch)).unwrap_err() };
    let steps = |steps: &[usize]| Keep { noise: false, steps: steps.iter().copied().collect() };
    let own = pipeline.start(&plain).unwrap();
    let begin = |done, latents: Tensor| Some(Start { done, latents, memory: BTreeMap::new() });
    let nan = (zeros(own.dims()) / 0.0).unwrap();
    let cases = [
        (
            Touch { keep: steps(&[5]), ..Touch::default() },
            "latents.return_steps: 5 is none of the steps 1 to 4".to_owned(),
        ),
        (
            Touch { keep: steps(&[2]), start: begin(2, own.clone()), ..Touch::default() },
            "2 is none of the steps 3 to 4".to_owned(),
        ),
        (
            Touch { start: begin(4, own.clone()), ..Touch::default() },
            "4 is none of the steps 1 to 3".to_owned(),
        ),
        (
            Touch { start: begin(0, own.clone()), ..Touch::default() },
            "0 is none of the steps 1 to 3".to_owned(),
        ),
        (Touch { start: begin(1, nan), ..Touch::default() }, "no finite numbers".to_owned()),
        (
            Touch { start: begin(1, zeros(&[1, 2])), ..Touch::default() },
            "the latents to go on from has shape [1, 2]".to_owned(),
        ),
        (
            Touch { decode_only: Some(zeros(&[1, 2])), ..Touch::default() },
            "decode_only's latents has shape [1, 2]".to_owned(),
        ),
        (
            Touch { route: Route { skip: vec![layers], repeat: vec![] }, ..Touch::default() },
            format!("layers.skip: there is no block {layers}: the model has {layers}"),
        ),
        (
            Touch { route: Route { skip: vec![], repeat: vec![0; layers + 1] }, ..Touch::default() },
            format!("layers.repeat: {} repetitions exceed the limit of {layers}", layers + 1),
        ),
        (
            Touch { route: Route { skip: vec![0], repeat: vec![0] }, ..Touch::default() },
            "block 0 is skipped too".to_owned(),
        ),
        (
            Touch { channels: Channels { permute: vec![0], ..Channels::default() }, ..Touch::default() },
            format!("channels.permute: 1 channels are named, the latents have {channels}"),
        ),
        (
            Touch {
                channels: Channels { permute: vec![channels; channels], ..Channels::default() },
                ..Touch::default()
            },
            format!("there is no channel {channels}"),
        ),
        (
            Touch { channels: Channels { scale: vec![1.0; 3], ..Channels::default() }, ..Touch::default() },
            format!("channels.scale: 3 numbers are given: one is needed, or {channels}"),
        ),
        (
            Touch { channels: Channels { scale: vec![f64::NAN], ..Channels::default() }, ..Touch::default() },
            "channels.scale: NaN is no finite number".to_owned(),
        ),
        (
            Touch {
                channels: Channels { scale: vec![2.0], after: Some(4), ..Channels::default() },
                ..Touch::default()
            },
            "channels.after: 4 is beyond step 3".to_owned(),
        ),
        (
            Touch { channels: Channels { after: Some(1), ..Channels::default() }, ..Touch::default() },
            "channels.after: there is nothing".to_owned(),
        ),
        (Touch { guidance: vec![f64::INFINITY], ..Touch::default() }, "guidance.curve: inf".to_owned()),
        (
            Touch { noise: Some(NoiseMix { seed: 1, weight: f64::NAN, way: Way::Line }), ..Touch::default() },
            "noise.weight: NaN".to_owned(),
        ),
        (
            Touch {
                prompt: Some(PromptMix { prompt: "red ".repeat(400), weight: 0.5, way: Way::Line }),
                ..Touch::default()
            },
            "prompt too long".to_owned(),
        ),
    ];
    for (touch, wanted) in cases {
        let text = refused(touch).to_string();
        assert!(text.contains(&wanted), "{text:?} does not say {wanted:?}");
    }
}
