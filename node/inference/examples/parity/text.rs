//! Tokenizer and text encoder.

use kinoflock_inference::models::ltx::pipeline::load_text_encoder;
use kinoflock_inference::text::PromptTokenizer;
use kinoflock_inference::{DType, Device, LoadOptions, Tensor};

use super::end_to_end::load_pipeline;
use super::golden::{Case, Outputs};

/// Ids and masks of every prompt, from each form of tokenizer that the folder holds.
pub(crate) fn tokenizer(case: &Case) -> Result<Outputs, String> {
    let folder = case.pipeline.join("tokenizer");
    let limit: usize = case.param("max_length")?;
    let prompts: Vec<String> = case.param("prompts")?;
    let (json, spiece) = (folder.join("tokenizer.json").exists(), folder.join("spiece.model").exists());
    let mut ways = Vec::new();
    if json || !spiece {
        ways.push(("", PromptTokenizer::load(&folder)));
    }
    if spiece {
        ways.push((if json { "spiece.model" } else { "" }, PromptTokenizer::load_spiece(&folder)));
    }
    let mut outputs = Vec::new();
    for (label, tokenizer) in ways {
        let tokenizer = tokenizer.map_err(|error| error.to_string())?;
        check_id(case, "pad_id", tokenizer.pad_id)?;
        check_id(case, "eos_id", tokenizer.eos_id)?;
        for (index, prompt) in prompts.iter().enumerate() {
            let encoded = tokenizer.encode(prompt, limit).map_err(|error| error.to_string())?;
            let raw = tokenizer.ids(prompt).map_err(|error| error.to_string())?;
            let mask: Vec<u32> = encoded.mask.iter().map(|&bit| u32::from(bit)).collect();
            outputs.push((format!("out.ids_padded.{index}"), label, row(&encoded.ids)?));
            outputs.push((format!("out.ids_raw.{index}"), label, row(&raw)?));
            outputs.push((format!("out.mask.{index}"), label, row(&mask)?));
        }
    }
    Ok(outputs)
}

fn check_id(case: &Case, name: &str, ours: u32) -> Result<(), String> {
    match case.maybe::<u32>(name)? {
        Some(theirs) if theirs != ours => Err(format!("{name} is {ours} here and {theirs} in the reference")),
        _ => Ok(()),
    }
}

fn row(ids: &[u32]) -> Result<Tensor, String> {
    Tensor::from_slice(ids, ids.len(), &Device::Cpu).map_err(|error| error.to_string())
}

/// The last hidden state, with and without the mask.
pub(crate) fn encoder(case: &Case) -> Result<Outputs, String> {
    let (encoder, _) =
        load_text_encoder(&case.pipeline, &LoadOptions::default()).map_err(|error| error.to_string())?;
    let ids = case.input("in.input_ids")?.to_dtype(DType::U32).map_err(|error| error.to_string())?;
    let forward = |mask: Option<&Tensor>| encoder.forward(&ids, mask).map_err(|error| error.to_string());
    let mut outputs = vec![("out.no_mask".to_owned(), "", forward(None)?)];
    if let Ok(mask) = case.input("in.attention_mask") {
        outputs.push(("out.masked".to_owned(), "", forward(Some(mask))?));
    }
    Ok(outputs)
}

/// What the pipeline makes of a prompt and a negative prompt.
pub(crate) fn prompt_embeds(case: &Case) -> Result<Outputs, String> {
    let pipeline = load_pipeline(case)?;
    let mut outputs = Vec::new();
    for (param, name) in [("prompt", "prompt"), ("negative_prompt", "negative")] {
        if let Some(prompt) = case.maybe::<String>(param)? {
            let (embeds, mask) = pipeline.encode_prompt(&prompt, true).map_err(|error| error.to_string())?;
            outputs.push((format!("out.{name}_embeds"), "", embeds));
            outputs.push((format!("out.{name}_mask"), "", mask));
        }
    }
    Ok(outputs)
}
