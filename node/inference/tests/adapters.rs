//! Adapters against the reference, in every naming and both ways; what a run with them leaves behind; and files that are
//! none. `fixtures/lora.py` made the files in `fixtures/lora`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kinoflock_inference::adapter::{AdapterFault, MAX_RANK, Places};
use kinoflock_inference::offload::Offload;
use kinoflock_inference::pipeline::latents::unpack;
use kinoflock_inference::registry::facts;
use kinoflock_inference::{
    Adapter, DType, Device, Error, GenerateRequest, LoadOptions, Lora, Observer, Pipeline, Silent, StepEvent,
    Tensor, load,
};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::Value;

/// Greatest file that these tests read.
const LIMIT: u64 = 1 << 20;
/// Of the greatest value: the goldens' tolerance for whole runs.
const TOLERANCE: f64 = 3e-5;

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// What the reference made with a model's two adapters.
struct Case {
    pipeline: PathBuf,
    call: Value,
    results: BTreeMap<String, Tensor>,
    adapters: [Adapter; 2],
}

fn case(name: &str) -> Case {
    let folder = tests().join("fixtures/lora").join(name);
    let bytes = std::fs::read(folder.join("result.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let call: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["call"]).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: TensorView<'_>| {
        Tensor::from_raw_buffer(view.data(), DType::F32, view.shape(), &Device::Cpu).unwrap()
    };
    let results = tensors.tensors().into_iter().map(|(name, view)| (name, tensor(view))).collect();
    let adapter = |index: usize| {
        let file = folder.join(["a.safetensors", "b.safetensors"][index]);
        let lora = Lora::read(&file, "the file", LIMIT).unwrap();
        Adapter { lora: Arc::new(lora), scale: call["scales"][index].as_f64().unwrap() }
    };
    let pipeline = tests().join("goldens").join(call["model"].as_str().unwrap()).join("pipeline");
    Case { pipeline, adapters: [adapter(0), adapter(1)], call, results }
}

impl Case {
    fn request(&self, pipeline: &dyn Pipeline, adapters: &[Adapter]) -> GenerateRequest {
        let number = |name: &str| self.call[name].as_u64().unwrap() as usize;
        let mut request =
            GenerateRequest::new(self.call["prompt"].as_str().unwrap(), &pipeline.info().defaults);
        request.negative_prompt = self.call["negative_prompt"].as_str().unwrap().to_owned();
        (request.width, request.height, request.frames) =
            (number("width"), number("height"), number("num_frames"));
        request.steps = number("num_inference_steps");
        request.guidance = self.call["guidance_scale"].as_f64().unwrap();
        request.fps = self.call["frame_rate"].as_f64().unwrap_or(request.fps);
        request.initial_latents = Some(self.results["start"].clone());
        request.adapters = adapters.to_vec();
        request.truncate_prompt = true;
        request.decode.skip = true;
        request
    }

    /// The latents after the last step, as the model keeps them.
    fn run(&self, pipeline: &mut dyn Pipeline, adapters: &[Adapter]) -> Tensor {
        let mut last = Last(None);
        pipeline.generate(&self.request(pipeline, adapters), &mut last).unwrap();
        last.0.unwrap()
    }

    fn open(&self) -> Box<dyn Pipeline> {
        load(&self.pipeline, &LoadOptions::default()).unwrap()
    }

    /// How far a result is from the reference's, in parts of its greatest value.
    fn distance(&self, made: &Tensor, expected: &str) -> f64 {
        let expected = &self.results[expected];
        let greatest = |tensor: &Tensor| tensor.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let packed = made.dims() != expected.dims();
        let made = if packed { self.unpacked(made, expected.dims()) } else { made.clone() };
        f64::from(greatest(&(made - expected).unwrap()) / greatest(expected))
    }
}

impl Case {
    /// Packed tokens as the volume that the reference keeps.
    fn unpacked(&self, packed: &Tensor, volume: &[usize]) -> Tensor {
        let patch = facts(&self.pipeline).unwrap().info.work.patch;
        unpack(packed, [volume[2], volume[3], volume[4]], patch).unwrap()
    }
}

struct Last(Option<Tensor>);

impl Observer for Last {
    fn step(&mut self, event: &StepEvent<'_>) {
        self.0 = Some(event.latents.clone());
    }
}

/// One adapter, two at once of which one is turned round, and then none again, beside the layers and in them.
fn assert_as_the_reference(name: &str) {
    let tolerance = TOLERANCE;
    let case = case(name);
    let mut pipeline = case.open();
    let plain = case.run(&mut *pipeline, &[]);
    assert!(case.distance(&plain, "plain") < tolerance, "plain: {}", case.distance(&plain, "plain"));
    assert!(case.distance(&plain, "both") > 0.01, "these adapters change nothing that can be seen");
    for (adapters, expected) in [(&case.adapters[..1], "first"), (&case.adapters[..], "both")] {
        let beside = case.run(&mut *pipeline, adapters);
        let far = case.distance(&beside, expected);
        assert!(far < tolerance, "{name} {expected} beside: {far}");
        let places = Places::merging(adapters.to_vec());
        let options = LoadOptions { places, ..LoadOptions::default() };
        let mut in_weights = load(&case.pipeline, &options).unwrap();
        let merged = case.run(&mut *in_weights, adapters);
        let far = case.distance(&merged, expected);
        assert!(far < tolerance, "{name} {expected} merged: {far}");
        println!("{name}, {expected}: {far:.1e} of the greatest value");
        // What is in the weights must be what the run asks for.
        let other = case.request(&*in_weights, &[]);
        let error = in_weights.generate(&other, &mut Silent).unwrap_err();
        assert_eq!(error.code(), "adapter_merged");
    }
    let again = case.run(&mut *pipeline, &[]);
    let bits = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(bits(&again), bits(&plain), "a run with adapters changed the next one without");
}

#[test]
fn ltx_video_with_adapters_is_as_the_reference() {
    assert_as_the_reference("ltx-video-0.9.0");
}

#[test]
fn wan_with_adapters_in_its_own_naming_is_as_the_reference() {
    assert_as_the_reference("wan2.1");
}

#[test]
fn wan_with_adapters_in_the_naming_of_musubi_is_as_the_reference() {
    assert_as_the_reference("musubi/wan2.1");
}

#[test]
fn cogvideox_with_adapters_whose_scale_is_in_the_metadata_is_as_the_reference() {
    assert_as_the_reference("cogvideox-2b");
}

#[test]
fn mochi_with_adapters_is_as_the_reference() {
    assert_as_the_reference("mochi-1");
}

#[test]
fn what_a_run_commits_to_follows_from_its_adapters_and_their_scales() {
    let case = case("wan2.1");
    let pipeline = case.open();
    let conditioning =
        |adapters: &[Adapter]| pipeline.commitment(&case.request(&*pipeline, adapters)).unwrap().conditioning;
    let [a, b] = &case.adapters;
    let louder = Adapter { scale: 2.0, ..a.clone() };
    let all = [vec![], vec![a.clone()], vec![louder], vec![a.clone(), b.clone()], vec![b.clone(), a.clone()]];
    let distinct: std::collections::BTreeSet<_> = all.iter().map(|adapters| conditioning(adapters)).collect();
    assert_eq!(distinct.len(), all.len());
}

/// Layers that are read anew for every clip get the run's adapters too, and merged ones again.
#[test]
fn components_that_go_in_turn_have_the_adapters_each_time() {
    for name in ["ltx-video-0.9.0", "wan2.1"] {
        let case = case(name);
        for places in [Places::default(), Places::merging(case.adapters.to_vec())] {
            let options = LoadOptions { offload: Offload::InTurn, places, ..LoadOptions::default() };
            let mut pipeline = load(&case.pipeline, &options).unwrap();
            for _ in 0..2 {
                let made = case.run(&mut *pipeline, &case.adapters);
                assert!(case.distance(&made, "both") < TOLERANCE, "{name}: {}", case.distance(&made, "both"));
            }
        }
    }
}

#[test]
fn an_audited_step_is_computed_with_the_adapters() {
    let case = case("ltx-video-0.9.0");
    let mut pipeline = case.open();
    let step = |pipeline: &mut dyn Pipeline, adapters: &[Adapter]| {
        let request = case.request(pipeline, adapters);
        let start = pipeline.start(&request).unwrap();
        let moved = pipeline.transition(&request, 0, &start).unwrap();
        (moved.output, moved.change, start)
    };
    struct First(Option<Tensor>);
    impl Observer for First {
        fn step(&mut self, event: &StepEvent<'_>) {
            self.0.get_or_insert_with(|| event.latents.clone());
        }
    }
    let mut first = First(None);
    let request = case.request(&*pipeline, &case.adapters);
    pipeline.generate(&request, &mut first).unwrap();
    let after = first.0.unwrap();
    let with = step(&mut *pipeline, &case.adapters);
    let without = step(&mut *pipeline, &[]);
    let far = |(output, change, start): &(Tensor, f32, Tensor)| {
        let computed = (start + (output * f64::from(*change)).unwrap()).unwrap();
        (computed - &after).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
    };
    assert!(far(&with) < 1e-5 && far(&without) > 1e-2, "{} {}", far(&with), far(&without));
}

/// A file of tensors of zeros, or of these bytes.
fn file(tensors: &[(&str, Dtype, &[usize])]) -> Vec<u8> {
    let data: Vec<_> = tensors
        .iter()
        .map(|(_, dtype, shape)| vec![0u8; shape.iter().product::<usize>() * dtype.bitsize() / 8])
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, dtype, shape), data)| {
        ((*name).to_owned(), TensorView::new(*dtype, shape.to_vec(), data).unwrap())
    });
    serialize(views, None).unwrap()
}

fn fault(bytes: Vec<u8>) -> AdapterFault {
    let lora = match Lora::from_bytes(bytes, "the file") {
        Ok(lora) => lora,
        Err(error) => return *error.fault,
    };
    let case = case("ltx-video-0.9.0");
    let mut pipeline = case.open();
    let request = case.request(&*pipeline, &[Adapter { lora: Arc::new(lora), scale: 1.0 }]);
    match pipeline.generate(&request, &mut Silent) {
        Err(Error::Adapter(error)) => *error.fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_that_is_no_adapter_of_this_model_is_refused_with_the_tensor_that_is_wrong() {
    const Q: &str = "transformer.transformer_blocks.0.attn1.to_q";
    let f32 = Dtype::F32;
    let key = |part: &str| format!("{Q}.{part}");
    let (down, up) = (key("lora_A.weight"), key("lora_B.weight"));
    let good: &[(&str, Dtype, &[usize])] = &[(&down, f32, &[2, 32]), (&up, f32, &[32, 2])];
    assert!(Lora::from_bytes(file(good), "the file").is_ok());
    let wide = [("transformer.blocks.0.attn1.to_q.lora_A.weight", f32, &[2usize, 48][..])];
    let other = [wide[0], ("transformer.blocks.0.attn1.to_q.lora_B.weight", f32, &[48, 2])];
    let found = fault(file(&other)).to_string();
    assert!(found.contains("blocks.0.attn1.to_q") && found.contains("another one"), "{found}");
    let says = |bytes: Vec<u8>, code: &str, word: &str| {
        let found = fault(bytes);
        assert_eq!(found.code(), code, "{found}");
        assert!(found.to_string().contains(word), "{found}");
    };
    says(file(&[good[0], (&up, f32, &[33, 2])]), "adapter_shape", "[33, 2]");
    says(file(&[(&down, f32, &[2, 31]), good[1]]), "adapter_shape", "[rank, 32]");
    says(file(&[(&down, f32, &[0, 32]), (&up, f32, &[32, 0])]), "adapter_shape", "[0, 32]");
    says(file(&[good[0]]), "adapter_alone", "up");
    says(file(&[good[1]]), "adapter_alone", "down");
    let second = key("lora_down.weight");
    says(file(&[good[0], good[1], (&second, f32, &[2, 32])]), "adapter_twice", "lora_down");
    let twin =
        ["lora_A.weight", "lora_B.weight"].map(|part| format!("transformer_blocks.0.attn1.to_q.{part}"));
    says(
        file(&[good[0], good[1], (&twin[0], f32, &[2, 32]), (&twin[1], f32, &[32, 2])]),
        "adapter_twice",
        "to_q",
    );
    says(file(&[("model.weight", f32, &[2])]), "adapter_unknown_key", "model.weight");
    says(file(&[(&down, Dtype::I32, &[2, 32]), good[1]]), "adapter_numbers", "I32");
    let steep = MAX_RANK + 1;
    says(file(&[(&down, f32, &[steep, 1]), (&up, f32, &[1, steep])]), "adapter_too_large", "4097");
    says(file(&[("text_encoder.a.lora_A.weight", f32, &[1, 1])]), "adapter_empty", "no matrices");
    says(file(&[good[0], good[1], (&key("alpha"), f32, &[3])]), "adapter_shape", "one number");
    says(b"PK\x03\x04".to_vec(), "adapter_corrupt", "safetensors");
    says(u64::MAX.to_le_bytes().to_vec(), "adapter_too_large", "header");
    let mut cut = file(good);
    cut.truncate(cut.len() - 1);
    says(cut, "adapter_corrupt", "safetensors");
    let mut infinite = file(good);
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    says(infinite, "adapter_not_finite", "lora_");
    let large = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(large.path(), file(good)).unwrap();
    let error = Lora::read(large.path(), "the file", 10).unwrap_err();
    assert!(error.to_string().contains("exceed the limit of 10"), "{error}");
    assert_eq!(error.fault.code(), "adapter_too_large");
}

#[test]
fn a_scale_that_is_no_number_is_refused_and_a_merged_file_must_fit_too() {
    let case = case("wan2.1");
    let mut pipeline = case.open();
    let nothing = Adapter { scale: f64::NAN, ..case.adapters[0].clone() };
    let request = case.request(&*pipeline, &[nothing]);
    assert_eq!(pipeline.generate(&request, &mut Silent).unwrap_err().code(), "adapter_scale");
    for (other, code) in [("cogvideox-2b", "adapter_no_layer"), ("mochi-1", "adapter_shape")] {
        let adapters = self::case(other).adapters;
        let count = if other == "cogvideox-2b" { 1 } else { 2 };
        let places = Places::merging(adapters[..count].to_vec());
        let options = LoadOptions { places, ..LoadOptions::default() };
        let Err(error) = load(&case.pipeline, &options) else { panic!("another model's adapter is merged") };
        assert_eq!(error.code(), code, "{error}");
    }
}
