//! What is computed once instead of twice: the text's embeddings, and guidance's predictions as one batch.
#![allow(clippy::unwrap_used)]

#[path = "support/forms.rs"]
mod forms;

use forms::{PIPELINES, golden, request};
use kinoflock_inference::offload::InTurn;
use kinoflock_inference::sampler::guidance::GuidancePasses;
use kinoflock_inference::text::PromptEncoder;
use kinoflock_inference::{GenerateRequest, LoadOptions, Silent, load};

#[test]
fn a_prompt_is_encoded_once_however_often_it_is_asked_for() {
    let (encoder, _) =
        PromptEncoder::load(&golden("wan2.1"), &LoadOptions::default(), 24, &InTurn::default()).unwrap();
    let (first, mask) = encoder.encode("a red dog", false, true).unwrap();
    let (again, same_mask) = encoder.encode("a red dog", false, true).unwrap();
    assert_eq!(encoder.encodings(), 1);
    assert_eq!(
        first.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        again.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
    assert_eq!(mask.to_vec2::<u8>().unwrap(), same_mask.to_vec2::<u8>().unwrap());
    // Another text, and the same one read otherwise.
    encoder.encode("cold fog", false, true).unwrap();
    encoder.encode("a red dog", false, false).unwrap();
    assert_eq!(encoder.encodings(), 3);
    for _ in 0..3 {
        encoder.encode("a red dog", false, true).unwrap();
        encoder.encode("cold fog", false, true).unwrap();
    }
    assert_eq!(encoder.encodings(), 3);
}

#[test]
fn guidance_in_one_batch_gives_what_two_passes_give() {
    for &(name, pictures) in PIPELINES {
        let folder = golden(name);
        let mut pipeline = load(&folder, &LoadOptions::default()).unwrap();
        let mut request = request(&folder, pictures);
        (request.guidance_rescale, request.decode.skip) = (0.3, true);
        let mut run = |guidance_passes| {
            let request = GenerateRequest { guidance_passes, ..request.clone() };
            (pipeline.generate(&request, &mut Silent).unwrap(), pipeline.commitment(&request).unwrap())
        };
        let (together, apart) = (run(GuidancePasses::Together), run(GuidancePasses::Apart));
        // On the CPU a row's sums do not depend on the rows beside it.
        assert_eq!(together.0.step_hashes, apart.0.step_hashes, "{name}");
        assert_eq!(together.1, apart.1, "{name}: both are the same run");
        assert_eq!(run(GuidancePasses::Auto).0.step_hashes, apart.0.step_hashes, "{name}");
        let unguided = GenerateRequest { guidance: 1.0, ..request.clone() };
        let unguided = pipeline.generate(&unguided, &mut Silent).unwrap();
        assert_ne!(unguided.step_hashes, apart.0.step_hashes, "{name}: guidance changes something");
    }
}
