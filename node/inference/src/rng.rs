//! Random numbers that are the same on every device: Philox4x32-10 on the CPU, then Box-Muller.
//!
//! Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) is a counter-based generator: block `n`
//! of a stream is a function of seed, stream and `n` alone. Key = the seed's low and high 32 bits; counter = block
//! number low and high 32 bits, stream, 0. A block's four words make two pairs; a pair `(a, b)` makes two normals:
//! `u = (a + 1) / 2^32` in (0, 1], `r = sqrt(-2 ln u)`, `t = 2 pi b / 2^32`, giving `r cos t` and `r sin t`, computed
//! in f64 and rounded to f32. Numbers are taken in order, so a longer draw begins with the shorter one.

use candle_core::{Device, Result, Shape, Tensor};

/// Which of a job's draws: streams of one seed are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The latents that denoising starts from.
    Initial,
    /// The noise that a timestep-conditioned decoder's input gets.
    Decode,
    /// The n-th draw for given pictures: from the distribution of latents that one is encoded to, or what hides it.
    Image(u32),
    /// The n-th spatial noise that a decoder injects.
    Inject(u32),
    /// The noise of the n-th step of a stochastic sampler.
    Step(u32),
    /// The noise that hides the blocks of an enlarged picture.
    Block {
        /// The part of the clip, zero-based, below 2^20.
        unit: u32,
        /// The stage that begins with the enlarged picture, below 256.
        stage: u32,
    },
}

impl Stream {
    fn number(self) -> u32 {
        const IMAGE: u32 = 0x1000_0000;
        const BLOCK: u32 = 0x2000_0000;
        const UNITS: u32 = 1 << 20;
        const STAGES: u32 = 1 << 8;
        const INJECT: u32 = 0x4000_0000;
        const STEP: u32 = 0x8000_0000;
        match self {
            Self::Initial => 0,
            Self::Decode => 1,
            Self::Image(0) => 2,
            Self::Image(n) => IMAGE | (n & (IMAGE - 1)),
            Self::Inject(n) => INJECT | (n & (INJECT - 1)),
            Self::Step(n) => STEP | (n & (STEP - 1)),
            Self::Block { unit, stage } => BLOCK | (unit % UNITS * STAGES) | (stage % STAGES),
        }
    }
}

/// `count` standard normals of a stream, from its beginning.
#[must_use]
pub fn normals(seed: u64, stream: Stream, count: usize) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    let stream = stream.number();
    let mut out = Vec::with_capacity(count + 3);
    let mut block: u64 = 0;
    while out.len() < count {
        let words = philox([block as u32, (block >> 32) as u32, stream, 0], key);
        for pair in words.chunks_exact(2) {
            let u = (f64::from(pair[0]) + 1.0) / 4_294_967_296.0;
            let radius = (-2.0 * u.ln()).sqrt();
            let angle = std::f64::consts::TAU * (f64::from(pair[1]) / 4_294_967_296.0);
            out.push((radius * angle.cos()) as f32);
            out.push((radius * angle.sin()) as f32);
        }
        block += 1;
    }
    out.truncate(count);
    out
}

/// Standard normals as an f32 tensor, drawn on the CPU and moved to `device`.
///
/// # Errors
/// When the device has no room.
pub fn normal_tensor(seed: u64, stream: Stream, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    Tensor::from_vec(normals(seed, stream, shape.elem_count()), shape, device)
}

/// One block of Philox4x32 with ten rounds.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const ROUNDS: usize = 10;
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The known answers that the generator's authors publish with it (Random123, `kat_vectors`).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    /// Computed by a second implementation of the text above, in Python.
    #[test]
    fn one_seed_means_these_numbers_for_ever() {
        let near = |ours: &[f32], golden: &[f32]| {
            assert_eq!(ours.len(), golden.len());
            assert!(
                ours.iter().zip(golden).all(|(a, b)| (a - b).abs() <= 4e-7 * b.abs()),
                "{ours:?} {golden:?}"
            );
        };
        let golden = [-0.970_189_8, 0.194_018_96, -1.235_620_7, 1.923_926_7, -0.073_181_51, 0.139_137_5];
        near(&normals(42, Stream::Initial, 6), &golden);
        let golden = [-1.863_362_2, -1.756_730_2, 0.064_963_02, 1.197_636_6, -1.538_830_4, -0.020_649_988];
        near(&normals(0xFEDC_BA98_7654_3210, Stream::Decode, 6), &golden);
    }

    #[test]
    fn a_longer_draw_begins_with_the_shorter_and_streams_differ() {
        let long = normals(7, Stream::Initial, 33);
        assert_eq!(long[..5], normals(7, Stream::Initial, 5));
        assert_ne!(long, normals(7, Stream::Decode, 33));
        assert_ne!(long, normals(8, Stream::Initial, 33));
        let block = |unit, stage| normals(7, Stream::Block { unit, stage }, 33);
        assert_ne!(block(1, 2), block(2, 1));
        assert_ne!(block(1, 2), normals(7, Stream::Inject(258), 33));
    }

    #[test]
    fn the_draws_are_standard_normal() {
        let draws = normals(1, Stream::Initial, 100_000);
        let mean = draws.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e5;
        let variance = draws.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        assert!(draws.iter().all(|x| x.is_finite()));
    }
}
