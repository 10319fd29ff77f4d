//! Weights of 8 bits, and GGUF files: what is loaded is what the file's numbers say, by whatever names, and a broken file is
//! an error with its name.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use kinoflock_inference::nn::linear::Linear;
use kinoflock_inference::plan::{MemoryPlan, PlanOptions};
use kinoflock_inference::registry::facts;
use kinoflock_inference::rng::{Stream, normal_tensor};
use kinoflock_inference::weights::{self, Weights, WeightsError};
use kinoflock_inference::{DType, Device, LoadOptions, Tensor, load};

#[path = "support/folders.rs"]
mod folders;

use folders::{Named, apart, copied, here, read, run, write};

const CPU: Device = Device::Cpu;
const STEM: &str = "diffusion_pytorch_model";
const WHOLE: &str = "transformer/diffusion_pytorch_model.safetensors";

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn is_matrix(name: &str, tensor: &Tensor) -> bool {
    name.ends_with(".weight") && tensor.rank() == 2
}

/// A safetensors file by hand, because candle has no numbers of 5 exponent bits.
fn safetensors_file(file: &Path, tensors: &[(String, safetensors::Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, file).unwrap();
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    values(tensor).into_iter().flat_map(f32::to_le_bytes).collect()
}

/// A matrix in 8 bits, its scales by `key`, and what it then holds. Candle's own numbers of 4 exponent bits are the other
/// side of the comparison.
fn narrowed(tensor: &Tensor, is_e5m2: bool, rows: bool) -> (Vec<u8>, Tensor, Tensor) {
    let greatest = |x: Tensor| if rows { x.max_keepdim(1) } else { x.max_all()?.reshape((1, 1)) };
    let scale = (greatest(tensor.abs().unwrap()).unwrap() / 448.0).unwrap();
    let scaled = tensor.broadcast_div(&scale).unwrap();
    if is_e5m2 {
        let codes: Vec<u8> =
            values(&scaled).into_iter().map(|x| (half::f16::from_f32(x).to_bits() >> 8) as u8).collect();
        let held = codes.iter().map(|&code| half::f16::from_bits(u16::from(code) << 8).to_f32());
        let held = Tensor::from_vec(held.collect::<Vec<_>>(), tensor.shape(), &CPU).unwrap();
        return (codes, held.broadcast_mul(&scale).unwrap(), scale);
    }
    let narrow = scaled.to_dtype(DType::F8E4M3).unwrap();
    let codes = safetensors::View::data(&narrow).into_owned();
    let held = narrow.to_dtype(DType::F32).unwrap().broadcast_mul(&scale).unwrap();
    (codes, held, scale)
}

#[test]
fn weights_of_8_bits_among_others_are_widened_with_their_scales() {
    use safetensors::Dtype;
    let (mixed, plain) = (copied("ltx-video-0.9.0"), copied("ltx-video-0.9.0"));
    let mut shards: [Vec<_>; 2] = [Vec::new(), Vec::new()];
    let mut map = serde_json::Map::new();
    let mut held = Named::new();
    let mut matrices = 0;
    for (name, tensor) in read(&plain.path().join(WHOLE)) {
        let shape = tensor.dims().to_vec();
        let layer = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
        let mut put = |shard: usize, name: String, dtype, shape, bytes| {
            map.insert(name.clone(), format!("part-{shard}.safetensors").into());
            shards[shard].push((name, dtype, shape, bytes));
        };
        if !is_matrix(&name, &tensor) {
            let narrow = tensor.to_dtype(DType::BF16).unwrap();
            let bits = narrow.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap();
            let bits = bits.into_iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
            put(0, name.clone(), Dtype::BF16, shape, bits);
            held.insert(name, narrow.to_dtype(DType::F32).unwrap());
            continue;
        }
        matrices += 1;
        let (is_e5m2, by_row) = (matrices % 2 == 0, matrices % 3 == 0);
        let (codes, widened, scale) = narrowed(&tensor, is_e5m2, by_row);
        put(matrices % 2, name.clone(), if is_e5m2 { Dtype::F8_E5M2 } else { Dtype::F8_E4M3 }, shape, codes);
        let (key, shape) = match (by_row, matrices % 4) {
            (true, _) => ("weight_scale", scale.dims().to_vec()),
            (false, 1) => ("scale_weight", vec![]),
            (false, _) => ("scale_weight", vec![1]),
        };
        // In the other shard than its weight, for some.
        put(0, format!("{layer}.{key}"), Dtype::F32, shape, bytes(&scale));
        put(1, format!("{layer}.scale_input"), Dtype::F32, vec![], 1f32.to_le_bytes().to_vec());
        held.insert(name, widened);
    }
    assert!(matrices > 20);
    shards[1].push(("scaled_fp8".to_owned(), Dtype::F8_E4M3, vec![0], vec![]));
    let part = mixed.path().join("transformer");
    std::fs::remove_file(mixed.path().join(WHOLE)).unwrap();
    for (index, shard) in shards.iter().enumerate() {
        safetensors_file(&part.join(format!("part-{index}.safetensors")), shard);
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    std::fs::write(part.join(format!("{STEM}.safetensors.index.json")), index.to_string()).unwrap();
    let full = run(plain.path());
    write(&plain.path().join(WHOLE), &held);
    let (given, expected) = (run(mixed.path()), run(plain.path()));
    assert!(given == expected, "the widened weights give another clip");
    println!("8-bit weights move the latents by {:.4} of the greatest", apart(&given.0, &full.0));
    let parameters = |folder: &Path| {
        Weights::open(&folder.join("transformer"), STEM, None, DType::F32, &CPU).unwrap().parameters()
    };
    assert_eq!(parameters(mixed.path()), parameters(plain.path()), "scales are no parameters");
}

#[test]
fn scales_that_fit_no_weight_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let scale = bytes(&Tensor::ones(3, DType::F32, &CPU).unwrap());
    let tensors = [
        ("a.weight".to_owned(), safetensors::Dtype::F8_E4M3, vec![2, 2], vec![0x38; 4]),
        ("a.weight_scale".to_owned(), safetensors::Dtype::F32, vec![3], scale),
    ];
    safetensors_file(&folder.path().join(format!("{STEM}.safetensors")), &tensors);
    let weights = Weights::open(folder.path(), STEM, None, DType::F32, &CPU).unwrap();
    let error = weights.build(|vb| vb.get((2, 2), "a.weight")).unwrap_err().to_string();
    assert!(error.contains("a.weight_scale holds 3 scales") && error.contains(".safetensors"), "{error}");
}

/// Writes tensors as GGUF, matrices in blocks where their rows are whole blocks.
fn write_gguf(file: &Path, tensors: &Named, kind: GgmlDType) {
    let blocks: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| {
            let fits = is_matrix(name, tensor) && tensor.dims()[1].is_multiple_of(kind.block_size());
            let kind = if fits { kind } else { GgmlDType::F32 };
            (name.as_str(), QTensor::quantize(tensor, kind).unwrap())
        })
        .collect();
    let tensors: Vec<_> = blocks.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let name = gguf_file::Value::String("tiny".to_owned());
    let words = gguf_file::Value::Array(vec![gguf_file::Value::String("a".to_owned()); 3]);
    let about = [("general.name", &name), ("tokenizer.ggml.tokens", &words)];
    gguf_file::write(&mut std::fs::File::create(file).unwrap(), &about, &tensors).unwrap();
}

/// What a GGUF file of these tensors holds.
fn rounded(tensors: &Named, kind: GgmlDType) -> Named {
    let round = |(name, tensor): (&String, &Tensor)| {
        let fits = is_matrix(name, tensor) && tensor.dims()[1].is_multiple_of(kind.block_size());
        let held = if fits {
            QTensor::quantize(tensor, kind).unwrap().dequantize(&CPU).unwrap()
        } else {
            tensor.clone()
        };
        (name.clone(), held)
    };
    tensors.iter().map(round).collect()
}

fn renamed(tensors: &Named, rename: impl Fn(&str) -> String) -> Named {
    tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect()
}

/// Diffusers' names to those of the original repositories and of llama.cpp, in this order.
const T5_NAMES: &[(&str, &str)] = &[
    ("encoder.final_layer_norm", "enc.output_norm"),
    ("encoder.block", "enc.blk"),
    ("shared", "token_embd"),
    ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    ("layer.0.SelfAttention.", "attn_"),
    ("layer.0.layer_norm", "attn_norm"),
    ("layer.1.layer_norm", "ffn_norm"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
    ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn_down"),
];
const LTX_NAMES: &[(&str, &str)] = &[
    ("proj_in", "patchify_proj"),
    ("time_embed", "adaln_single"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
];
const WAN_NAMES: &[(&str, &str)] = &[
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    (".norm_added_k.", ".norm_k_img."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
    (".scale_shift_table", ".modulation"),
    ("proj_out", "head.head"),
];

fn exchanged(name: &str, pairs: &[(&str, &str)]) -> String {
    let name = pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to));
    if name == "scale_shift_table" && pairs == WAN_NAMES { "head.modulation".to_owned() } else { name }
}

/// A golden whose text encoder and transformers are GGUF in both namings makes the clip of its rounded weights.
fn gguf_makes_the_same_clip(golden: &str, names: &[(&str, &str)], transformers: &[&str]) {
    let plain = copied(golden);
    let full = run(plain.path());
    let folders = [copied(golden), copied(golden)];
    let parts = transformers.iter().map(|part| (*part, STEM, names));
    for (part, stem, names) in parts.chain([("text_encoder", "model", T5_NAMES)]) {
        let file = format!("{part}/{stem}.safetensors");
        let tensors = read(&plain.path().join(&file));
        write(&plain.path().join(&file), &rounded(&tensors, GgmlDType::Q8_0));
        let others = renamed(&tensors, |name| exchanged(name, names));
        assert!(others.keys().any(|name| !tensors.contains_key(name)), "{part} has one naming alone");
        for (folder, tensors) in folders.iter().zip([&tensors, &others]) {
            std::fs::remove_file(folder.path().join(&file)).unwrap();
            write_gguf(&folder.path().join(part).join("weights-Q8_0.gguf"), tensors, GgmlDType::Q8_0);
        }
    }
    let expected = run(plain.path());
    assert!(expected.0 != full.0, "nothing was rounded");
    for folder in &folders {
        assert!(run(folder.path()) == expected, "{golden}: another clip");
    }
    let moved = apart(&expected.0, &full.0);
    println!("{golden}: Q8_0 moves the latents by {moved:.5} of the greatest");
    assert!(moved < 0.05, "{moved}");
}

#[test]
fn ltx_from_gguf_in_both_namings_makes_the_clip_of_its_rounded_weights() {
    gguf_makes_the_same_clip("ltx-video-0.9.0", LTX_NAMES, &["transformer"]);
}

#[test]
fn wan_from_gguf_in_both_namings_makes_the_clip_of_its_rounded_weights() {
    gguf_makes_the_same_clip("wan2.1", WAN_NAMES, &["transformer"]);
    gguf_makes_the_same_clip("wan2.2-a14b", WAN_NAMES, &["transformer", "transformer_2"]);
}

#[test]
fn wans_names_for_pictures_come_back() {
    let tensors = read(&here("goldens/wan2.1-flf2v/pipeline").join(WHOLE));
    assert!(tensors.keys().any(|name| name.contains("pos_embed")));
    for name in tensors.keys() {
        let theirs = format!("model.diffusion_model.{}", exchanged(name, WAN_NAMES));
        let back = kinoflock_inference::models::wan::names::transformer_name(&theirs);
        assert_eq!(back.as_ref(), Some(name), "{theirs}");
        assert_eq!(kinoflock_inference::models::wan::names::transformer_name(name).as_ref(), Some(name));
    }
}

/// Of the other families the transformer is published as GGUF in diffusers' naming alone.
#[test]
fn the_other_families_take_gguf_in_diffusers_naming() {
    for (golden, part) in [
        ("cogvideox-2b", "transformer"),
        ("mochi-1", "transformer"),
        ("pyramid-flow-miniflux", "diffusion_transformer_384p"),
    ] {
        let (folder, plain) = (copied(golden), copied(golden));
        let tensors = all(&plain.path().join(part));
        clear(&plain.path().join(part));
        clear(&folder.path().join(part));
        let kind = GgmlDType::Q8_0;
        write(&plain.path().join(part).join(format!("{STEM}.safetensors")), &rounded(&tensors, kind));
        write_gguf(&folder.path().join(part).join("any.gguf"), &tensors, kind);
        assert!(run(folder.path()) == run(plain.path()), "{golden}: another clip");
    }
}

/// The tensors of all of a part's files.
fn all(part: &Path) -> Named {
    let files = weights::find(part, STEM, None).unwrap();
    files.iter().flat_map(|file| read(file)).collect()
}

/// Takes a part's weights away.
fn clear(part: &Path) {
    for file in weights::find(part, STEM, None).unwrap() {
        std::fs::remove_file(file).unwrap();
    }
    let index = part.join(format!("{STEM}.safetensors.index.json"));
    if index.exists() {
        std::fs::remove_file(index).unwrap();
    }
}

/// The plan's transformer: its bytes, and those of them that are in blocks.
fn planned(folder: &Path, options: &PlanOptions) -> (u64, u64) {
    let request = facts(folder).unwrap().smallest();
    let plan = MemoryPlan::new(folder, &request, options).unwrap();
    let part = plan.components.iter().find(|component| component.name == "transformer").unwrap();
    (part.bytes, part.in_blocks)
}

#[test]
fn a_plan_counts_blocks_as_they_stay_and_all_else_in_the_numbers_of_the_run() {
    for (golden, names) in [("ltx-video-0.9.0", LTX_NAMES), ("wan2.1", WAN_NAMES)] {
        let plain = copied(golden);
        let tensors = read(&plain.path().join(WHOLE));
        let kind = GgmlDType::Q8_0;
        let fits = |name: &str, tensor: &Tensor| {
            is_matrix(name, tensor) && tensor.dims()[1].is_multiple_of(kind.block_size())
        };
        // What is put into another order when it is loaded is widened.
        let kept = |name: &str, tensor: &Tensor| {
            fits(name, tensor) && !(golden == "wan2.1" && name == "proj_out.weight")
        };
        let blocks = tensors.iter().filter(|(name, tensor)| kept(name, tensor));
        let blocks: usize =
            blocks.map(|(_, tensor)| tensor.elem_count() / kind.block_size() * kind.type_size()).sum();
        let gpu = PlanOptions { cpu: false, dtype: DType::F32, ..PlanOptions::default() };
        let (wide, none) = planned(plain.path(), &gpu);
        assert_eq!(none, 0);
        let matrices = tensors.iter().filter(|(name, tensor)| kept(name, tensor));
        let matrices: usize = matrices.map(|(_, tensor)| 4 * tensor.elem_count()).sum();
        let small = (wide - matrices as u64 + blocks as u64, blocks as u64);
        assert!(small.0 < wide && blocks > 0, "{golden}");
        for theirs in [false, true] {
            let folder = copied(golden);
            std::fs::remove_file(folder.path().join(WHOLE)).unwrap();
            let named = |name: &str| if theirs { exchanged(name, names) } else { name.to_owned() };
            write_gguf(&folder.path().join("transformer/any.gguf"), &renamed(&tensors, named), kind);
            assert_eq!(planned(folder.path(), &gpu), small, "{golden}");
            // Adapters that go into the weights widen them.
            let merges = PlanOptions { merges: true, ..gpu };
            assert_eq!(planned(folder.path(), &merges), (wide, 0), "{golden}");
            let on_cpu = PlanOptions::default();
            let (bytes, in_blocks) = planned(folder.path(), &on_cpu);
            assert!(in_blocks == small.1 && bytes < planned(plain.path(), &on_cpu).0, "{golden}");
        }
    }
}

#[test]
fn a_layer_in_blocks_computes_as_its_widened_weights_do() {
    let (input, output) = (512, 48);
    let random =
        |seed: u64, shape: (usize, usize)| normal_tensor(seed, Stream::Initial, shape, &CPU).unwrap();
    let (weight, x) = ((random(1, (output, input)) * 0.05).unwrap(), random(2, (40, input)));
    let exact = values(&x.matmul(&weight.t().unwrap()).unwrap());
    // The greatest error, as a part of the greatest result, that the type's step can make.
    for (kind, most) in [
        (GgmlDType::Q8_0, 0.01),
        (GgmlDType::Q6K, 0.03),
        (GgmlDType::Q5K, 0.06),
        (GgmlDType::Q5_1, 0.06),
        (GgmlDType::Q5_0, 0.06),
        (GgmlDType::Q4K, 0.12),
        (GgmlDType::Q4_1, 0.12),
        (GgmlDType::Q4_0, 0.12),
        (GgmlDType::Q3K, 0.25),
        (GgmlDType::Q2K, 0.5),
        (GgmlDType::F16, 0.001),
        (GgmlDType::BF16, 0.01),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let tensors = Named::from_iter([("layer.weight".to_owned(), weight.clone())]);
        write_gguf(&folder.path().join("one.gguf"), &tensors, kind);
        let weights = Weights::open(folder.path(), STEM, None, DType::F32, &CPU).unwrap();
        let kept = weights.build(|vb| Linear::load(input, output, false, vb.pp("layer"))).unwrap();
        let wide = weights.builder().get((output, input), "layer.weight").unwrap();
        let plain = Linear::new(wide, None).unwrap();
        let (kept, plain) = (kept.forward(&x).unwrap(), plain.forward(&x).unwrap());
        assert!(values(&kept) == values(&plain), "{kind:?} widened otherwise");
        let off = apart(&values(&kept), &exact);
        println!("{kind:?}: {off:.5}");
        assert!(off < most, "{kind:?} is off by {off}");
    }
}

#[test]
fn a_file_by_the_reference_has_the_values_that_the_reference_reads() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(here("fixtures/gguf-blocks.gguf"), folder.path().join("blocks.gguf")).unwrap();
    weights::check(folder.path(), STEM, None).unwrap();
    let weights = Weights::open(folder.path(), STEM, None, DType::F32, &CPU).unwrap();
    let expected = read(&here("fixtures/gguf-blocks.safetensors"));
    assert_eq!(expected.len(), 14);
    for (name, expected) in expected {
        let given = weights.builder().get(expected.shape(), &name).unwrap();
        let off = apart(&values(&given), &values(&expected));
        assert!(off <= 1e-6, "{name} is off by {off}");
    }
    let error = weights.build(|vb| vb.get((4, 8), "kernel.weight")).unwrap_err().to_string();
    assert!(error.contains("kernel.weight") && error.contains("[4, 2, 1, 2, 2]"), "{error}");
    let error = weights.build(|vb| Linear::load(128, 6, false, vb.pp("q4_k"))).unwrap_err().to_string();
    assert!(error.contains("q4_k.weight") && error.contains("blocks.gguf"), "{error}");
}

#[test]
fn a_gguf_file_that_is_cut_or_strange_is_named_and_never_a_panic() {
    let whole = std::fs::read(here("fixtures/gguf-blocks.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("blocks.gguf");
    let open = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        Weights::open(folder.path(), STEM, None, DType::F32, &CPU).map(drop)
    };
    open(&whole).unwrap();
    let header = whole.len() - 8192;
    for cut in (0..header).step_by(11).chain((header..whole.len() - 32).step_by(397)) {
        let error = open(&whole[..cut]).unwrap_err();
        assert!(matches!(error, WeightsError::Truncated { .. }), "{cut}: {error}");
        assert!(error.to_string().contains("blocks.gguf"), "{error}");
    }
    let mut refused = 0;
    for at in (0..1500).step_by(5) {
        for bit in [0, 7] {
            let mut changed = whole.clone();
            changed[at] ^= 1 << bit;
            // A changed value or name may be sound; the list then lies within the file.
            refused += usize::from(open(&changed).is_err());
        }
    }
    println!("{refused} of 600 changed files are refused");
    assert!(refused > 100);
    let mut huge = whole.clone();
    huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(open(&huge).is_err());
    let unknown = |from: u32, to: u32| {
        let mut changed = whole.clone();
        let name = b"q6_k.weight";
        let at = whole.windows(name.len()).position(|bytes| bytes == name).unwrap() + name.len() + 4 + 16;
        assert_eq!(changed[at..at + 4], from.to_le_bytes());
        changed[at..at + 4].copy_from_slice(&to.to_le_bytes());
        open(&changed).unwrap_err().to_string()
    };
    let error = unknown(14, 23);
    assert!(error.contains("q6_k.weight is of type IQ4_XS, which is not read here"), "{error}");
}

#[test]
fn several_files_without_a_published_name_are_not_chosen_from() {
    let folder = copied("ltx-video-0.9.0");
    let part = folder.path().join("transformer");
    let tensors = read(&folder.path().join(WHOLE));
    std::fs::rename(folder.path().join(WHOLE), part.join("mine.safetensors")).unwrap();
    assert_eq!(weights::find(&part, STEM, None).unwrap(), [part.join("mine.safetensors")]);
    write_gguf(&part.join("a-Q8_0.gguf"), &tensors, GgmlDType::Q8_0);
    assert_eq!(weights::find(&part, STEM, None).unwrap(), [part.join("a-Q8_0.gguf")]);
    write_gguf(&part.join("a-Q5_0.gguf"), &tensors, GgmlDType::Q5_0);
    let error = load(folder.path(), &LoadOptions::default()).err().unwrap().to_string();
    assert!(error.contains("a-Q5_0.gguf, a-Q8_0.gguf; leave one"), "{error}");
    let files = kinoflock_inference::registry::facts(folder.path()).unwrap().files(folder.path());
    assert!(files.is_err());
    std::fs::remove_file(part.join("a-Q5_0.gguf")).unwrap();
    let facts = kinoflock_inference::registry::facts(folder.path()).unwrap();
    facts.check_weights(folder.path()).unwrap();
    let files = facts.files(folder.path()).unwrap();
    assert!(files.contains("transformer/a-Q8_0.gguf") && !files.contains("transformer/mine.safetensors"));
}
