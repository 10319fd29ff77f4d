//! Frames to a clip: the cost of an H.264 encode, with its colour conversion, beside which diffusion is slow.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kinoflock_node::engine::encode::{Quality, encode_mp4};
use kinoflock_node::engine::frames::RgbFrames;

fn moving_square(width: usize, height: usize, count: usize) -> RgbFrames {
    let mut data = Vec::with_capacity(width * height * count * 3);
    for t in 0..count {
        for y in 0..height {
            for x in 0..width {
                let inside = x.abs_diff(width / 4 + t) < height / 6 && y.abs_diff(height / 2) < height / 6;
                let noise = (x * 31 + y * 17 + t * 7) as u8 & 15;
                data.extend(if inside { [220, 40 + noise, 40] } else { [40, 60, 140 + noise] });
            }
        }
    }
    RgbFrames { width, height, count, data }
}

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    group.sample_size(10);
    for (width, height, count) in [(64, 64, 17), (512, 320, 49)] {
        let frames = moving_square(width, height, count);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("{width}x{height}x{count}"), |bencher| {
            bencher
                .iter(|| encode_mp4(black_box(&frames), 16.0, Quality::Archive).expect("even sizes encode"));
        });
    }
    group.finish();
}

criterion_group!(benches, encode);
criterion_main!(benches);
