//! The CPU kernels against candle's own operations, over random shapes.

#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use kinoflock_inference::nn::attention::attention;
use kinoflock_inference::nn::conv3d::{Conv3d, Conv3dConfig, Edge, TimePad};
use kinoflock_inference::nn::frame_cache::FrameCache;
use kinoflock_inference::nn::group_norm::{GroupNorm, Spatial};
use kinoflock_inference::nn::linear::Linear;
use kinoflock_inference::nn::norm::Norm;
use kinoflock_inference::nn::{ops, set_generic_only, shuffle};
use proptest::prelude::*;

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// Runs a computation both ways and gives the largest difference.
fn both(run: impl Fn() -> Tensor) -> f32 {
    let fast = run();
    set_generic_only(true);
    let generic = run();
    set_generic_only(false);
    assert_eq!(fast.dims(), generic.dims());
    (fast - generic).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn edge() -> impl Strategy<Value = Edge> {
    prop_oneof![Just(Edge::Zeros), Just(Edge::Repeat)]
}

fn time() -> impl Strategy<Value = TimePad> {
    prop_oneof![edge().prop_map(TimePad::Causal), edge().prop_map(TimePad::Both), Just(TimePad::Valid)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn convolutions_agree(
        (batch, input, output) in (1usize..3, 1usize..20, 1usize..40),
        size in prop::array::uniform3(3usize..7),
        kernel in prop::array::uniform3(prop_oneof![Just(1usize), Just(3)]),
        stride in prop::array::uniform3(1usize..3),
        (time, space) in (time(), edge()),
    ) {
        let config = Conv3dConfig { input, output, kernel, stride, time, space };
        let x = random(&[batch, size[0], size[1], size[2], input]);
        let weight = random(&[output, input, kernel[0], kernel[1], kernel[2]]);
        let bias = random(&[output]);
        let out = config.output_size(size).unwrap();
        let residual = random(&[batch, out[0], out[1], out[2], output]);
        let (scale, shift) = (random(&[batch, output]), random(&[batch, output]));
        let norm = Norm::rms(1e-1).modulate(&scale, &shift).silu();
        let found = both(|| {
            let conv = Conv3d::new(config, weight.clone(), Some(bias.clone())).unwrap();
            conv.forward(&x).unwrap()
        });
        prop_assert!(found < 2e-4, "plain: {found}");
        let found = both(|| {
            let conv = Conv3d::new(config, weight.clone(), Some(bias.clone())).unwrap();
            conv.forward_with(&x, Some(&residual), Some(&norm)).unwrap()
        });
        prop_assert!(found < 2e-4, "with residual and norm: {found}");
    }

    #[test]
    fn attentions_agree(
        (batch, queries, keys, heads) in (1usize..3, 1usize..120, 1usize..1200, 1usize..4),
        (depth, width) in (1usize..70, 1usize..40),
        mask in 0usize..4,
    ) {
        let (q, k) = (random(&[batch, queries, heads, depth]), random(&[batch, keys, heads, depth]));
        let v = random(&[batch, keys, heads, width]);
        let shape = [
            if mask > 1 { batch } else { 1 }, if mask > 2 { heads } else { 1 }, if mask == 3 { queries } else { 1 }, keys,
        ];
        let mask = (mask > 0).then(|| (random(&shape) * 3.0).unwrap());
        let scale = 1.0 / (depth as f64).sqrt();
        let found = both(|| attention(&q, &k, &v, mask.as_ref(), scale).unwrap());
        prop_assert!(found < 1e-5, "{found}");
    }

    #[test]
    fn norms_agree(
        (batch, tokens, width) in (1usize..3, 1usize..40, 1usize..80),
        (layer, affine, silu, modulation) in (any::<bool>(), any::<bool>(), any::<bool>(), 0usize..3),
        factors in 0usize..3,
    ) {
        let x = random(&[batch, tokens, width]);
        let (weight, bias) = (random(&[width]), random(&[width]));
        let shape = if modulation == 1 { vec![batch, 1, width] } else { vec![batch, tokens, width] };
        let (scale, shift) = (random(&shape), random(&shape));
        let mut norm = if layer { Norm::layer(1e-3) } else { Norm::rms(1e-3) };
        if affine {
            norm = norm.weight(Some(&weight)).bias(Some(&bias));
        }
        if modulation > 0 {
            norm = norm.modulate(&scale, &shift);
        }
        let factor = random(&[if factors == 1 { 1 } else { batch }, 1, width]);
        if factors > 0 {
            norm = norm.factor(&factor);
        }
        if silu {
            norm = norm.silu();
        }
        let found = both(|| norm.apply(&x).unwrap());
        prop_assert!(found < 1e-4, "{found}");
    }

    #[test]
    fn linear_layers_and_activations_agree(rows in 1usize..50, input in 1usize..80, output in 1usize..80) {
        let (x, weight, bias) = (random(&[2, rows, input]), random(&[output, input]), random(&[output]));
        let residual = random(&[2, rows, output]);
        let layer = || Linear::new(weight.clone(), Some(bias.clone())).unwrap();
        prop_assert!(both(|| layer().forward(&x).unwrap()) < 1e-4);
        prop_assert!(both(|| layer().forward_gelu(&x).unwrap()) < 1e-4);
        prop_assert!(both(|| layer().forward_add(&x, &residual).unwrap()) < 1e-4);
        for gate in [random(&[2, 1, output]), random(&[2, rows, output])] {
            prop_assert!(both(|| layer().forward_gated(&x, &gate, &residual).unwrap()) < 1e-4);
        }
        prop_assert!(both(|| ops::silu(&x).unwrap()) < 1e-5);
        prop_assert!(both(|| ops::gelu_tanh(&x).unwrap()) < 1e-5);
        let twice = Tensor::cat(&[&x, &x], 2).unwrap();
        prop_assert!(both(|| ops::swiglu(&twice).unwrap()) < 1e-5);
    }

    #[test]
    fn shuffles_agree_exactly(
        (b, t, h, w) in (1usize..3, 1usize..4, 1usize..4, 1usize..5),
        (c, repeats) in (1usize..4, prop_oneof![Just(1usize), Just(2), Just(4), Just(8)]),
        (p, pt) in (1usize..5, 1usize..3),
    ) {
        let (grown, residual) = (random(&[b, t, h, w, c * repeats * 8]), random(&[b, t, h, w, c * 8]));
        prop_assert_eq!(both(|| shuffle::depth_to_space(&grown, [2, 2, 2], 1).unwrap()), 0.0);
        prop_assert_eq!(both(|| shuffle::grow_channels(&grown, &residual, [2, 2, 2], repeats).unwrap()), 0.0);
        for first_alone in [false, true] {
            prop_assert_eq!(both(|| shuffle::repeat(&residual, [pt, p, 2], first_alone).unwrap()), 0.0);
        }
        let cells = random(&[b, t, h, w, c * p * p * pt]);
        prop_assert_eq!(both(|| shuffle::unpatchify(&cells, p, pt).unwrap()), 0.0);
        let back = shuffle::patchify(&shuffle::unpatchify(&cells, p, pt).unwrap(), p, pt).unwrap();
        prop_assert_eq!((back - cells).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
    }
}

#[test]
fn a_convolution_of_one_tap_is_a_sum_of_products() {
    let config = Conv3dConfig::cube(2, 1, 1, true);
    let weight = Tensor::new(&[2f32, -1.0], &Device::Cpu).unwrap().reshape((1, 2, 1, 1, 1)).unwrap();
    let x = Tensor::new(&[3f32, 4.0], &Device::Cpu).unwrap().reshape((1, 1, 1, 1, 2)).unwrap();
    let out = Conv3d::new(config, weight, None).unwrap().forward(&x).unwrap();
    assert_eq!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [2.0]);
}

#[test]
fn a_causal_convolution_looks_at_no_later_frame() {
    let conv = Conv3d::new(Conv3dConfig::cube(3, 5, 3, true), random(&[5, 3, 3, 3, 3]), None).unwrap();
    let x = random(&[1, 6, 4, 4, 3]);
    let whole = conv.forward(&x).unwrap().narrow(1, 0, 4).unwrap();
    let early = conv.forward(&x.narrow(1, 0, 4).unwrap()).unwrap();
    assert_eq!((whole - early).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
}

#[test]
fn gradients_flow_through_the_generic_way_and_are_refused_by_packed_weights() {
    let x = candle_core::Var::randn(0f32, 1.0, (1, 3, 3, 3, 2), &Device::Cpu).unwrap();
    let weight = random(&[4, 2, 3, 3, 3]);
    let config = Conv3dConfig::cube(2, 4, 3, true);
    let packed = Conv3d::new(config, weight.clone(), None).unwrap();
    assert!(packed.forward(&x).unwrap_err().to_string().contains("set_generic_only"));
    let weight = candle_core::Var::from_tensor(&weight).unwrap();
    let conv = Conv3d::new(config, weight.as_tensor().clone(), None).unwrap();
    let gradients = conv.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&x).is_some() && gradients.get(&weight).is_some());
}

#[test]
fn half_types_are_widened_and_come_back() {
    let conv = Conv3d::new(Conv3dConfig::cube(3, 4, 3, false), random(&[4, 3, 3, 3, 3]), None).unwrap();
    let x = random(&[1, 2, 4, 4, 3]);
    let out = conv.forward(&x.to_dtype(DType::BF16).unwrap()).unwrap();
    assert_eq!(out.dtype(), DType::BF16);
    let q = random(&[1, 5, 2, 8]);
    let whole = attention(&q, &q, &q, None, 0.3).unwrap();
    let half = q.to_dtype(DType::F16).unwrap();
    let near = attention(&half, &half, &half, None, 0.3).unwrap();
    assert_eq!(near.dtype(), DType::F16);
    let found = (near.to_dtype(DType::F32).unwrap() - whole).unwrap().abs().unwrap().flatten_all().unwrap();
    assert!(found.max(0).unwrap().to_scalar::<f32>().unwrap() < 5e-3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn group_norms_agree(
        (batch, groups, per_group) in (1usize..3, 1usize..5, 1usize..6),
        size in prop::array::uniform3(1usize..6),
        (spatial, silu) in (any::<bool>(), any::<bool>()),
    ) {
        let channels = groups * per_group;
        let shape = [batch, size[0], size[1], size[2], channels];
        let x = ((random(&shape) * 2.0).unwrap() + 3.0).unwrap();
        let (scale, shift) = (random(&[batch, 3, channels]), random(&[batch, 3, channels]));
        let positions = size.iter().product::<usize>() as u32;
        let cells: Vec<u32> = (0..positions).map(|i| i * 7 % 3).collect();
        let modulation = Spatial { scale: &scale, shift: &shift, cells: &cells };
        let norm = GroupNorm::new(groups, 1e-2, random(&[channels]), random(&[channels])).unwrap();
        let found = both(|| match (spatial, silu) {
            (true, silu) => norm.forward_spatial(&x, &modulation, silu).unwrap(),
            (false, true) => norm.forward_silu(&x).unwrap(),
            (false, false) => norm.forward(&x).unwrap(),
        });
        prop_assert!(found < 2e-4, "{found}");
    }

    #[test]
    fn a_causal_convolution_run_by_run_is_the_one_over_the_whole(
        (input, output, frames) in (1usize..9, 1usize..9, 1usize..9),
        (kernel, run, edge, space) in (1usize..5, 1usize..5, edge(), edge()),
    ) {
        let time = TimePad::Causal(edge);
        let config = Conv3dConfig { input, output, kernel: [kernel, 3, 1], stride: [1; 3], time, space };
        let x = random(&[2, frames, 4, 3, input]);
        let conv = Conv3d::new(config, random(&[output, input, kernel, 3, 1]), Some(random(&[output]))).unwrap();
        let whole = conv.forward(&x).unwrap();
        let mut cache = FrameCache::default();
        let mut parts = Vec::new();
        for start in (0..frames).step_by(run) {
            cache.rewind();
            let part = x.narrow(1, start, run.min(frames - start)).unwrap();
            parts.push(cache.conv(&conv, &part).unwrap());
        }
        let joined = Tensor::cat(&parts, 1).unwrap();
        prop_assert_eq!(joined.dims(), whole.dims());
        let difference = (joined - whole).unwrap().abs().unwrap().sum_all().unwrap();
        prop_assert!(difference.to_scalar::<f32>().unwrap() < 1e-4);
    }
}

#[test]
fn a_convolution_padded_after_the_end_reads_one_position_later() {
    let config = Conv3dConfig {
        input: 3,
        output: 5,
        kernel: [1, 3, 3],
        stride: [1, 2, 2],
        time: TimePad::Valid,
        space: Edge::Zeros,
    };
    let (weight, bias) = (random(&[5, 3, 1, 3, 3]), random(&[5]));
    for (height, width) in [(4, 6), (5, 7)] {
        let x = random(&[2, 3, height, width, 3]);
        let found = both(|| {
            let conv = Conv3d::new(config, weight.clone(), Some(bias.clone())).unwrap();
            conv.forward_padded_after(&x).unwrap()
        });
        assert!(found < 1e-4, "{found}");
        let conv = Conv3d::new(config, weight.clone(), Some(bias.clone())).unwrap();
        let ours = conv.forward_padded_after(&x).unwrap();
        let planes = x.permute((0, 1, 4, 2, 3)).unwrap().reshape((6, 3, height, width)).unwrap();
        let planes = planes.pad_with_zeros(2, 0, 1).unwrap().pad_with_zeros(3, 0, 1).unwrap();
        let theirs = planes.conv2d(&weight.squeeze(2).unwrap(), 0, 2, 1, 1).unwrap();
        let theirs = theirs.broadcast_add(&bias.reshape((1, 5, 1, 1)).unwrap()).unwrap();
        let (_, _, h, w) = theirs.dims4().unwrap();
        let theirs = theirs.permute((0, 2, 3, 1)).unwrap().reshape((2, 3, h, w, 5)).unwrap();
        let worst = (ours - theirs).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(worst < 1e-4, "{worst}");
    }
}
