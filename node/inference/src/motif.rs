//! motif, the bundled model: its folder in the published layout, inside the program.
//!
//! It is an ordinary model of the LTX-Video architecture. Whoever wants to run it writes [`FILES`] to a folder and
//! [`load`](crate::load)s that. How it was made stands in `training/`.

use std::path::Path;

/// Path within the folder, and content, of every file.
pub const FILES: &[(&str, &[u8])] = &[
    ("card.json", include_bytes!("../models/motif/card.json")),
    ("kinoflock.json", include_bytes!("../models/motif/kinoflock.json")),
    ("model_index.json", include_bytes!("../models/motif/model_index.json")),
    ("scheduler/scheduler_config.json", include_bytes!("../models/motif/scheduler/scheduler_config.json")),
    ("text_encoder/config.json", include_bytes!("../models/motif/text_encoder/config.json")),
    ("text_encoder/model.safetensors", include_bytes!("../models/motif/text_encoder/model.safetensors")),
    ("tokenizer/tokenizer.json", include_bytes!("../models/motif/tokenizer/tokenizer.json")),
    ("tokenizer/tokenizer_config.json", include_bytes!("../models/motif/tokenizer/tokenizer_config.json")),
    ("transformer/config.json", include_bytes!("../models/motif/transformer/config.json")),
    (
        "transformer/diffusion_pytorch_model.safetensors",
        include_bytes!("../models/motif/transformer/diffusion_pytorch_model.safetensors"),
    ),
    ("vae/config.json", include_bytes!("../models/motif/vae/config.json")),
    (
        "vae/diffusion_pytorch_model.safetensors",
        include_bytes!("../models/motif/vae/diffusion_pytorch_model.safetensors"),
    ),
];

/// Writes every file under a folder.
///
/// # Errors
/// What the system reports.
pub fn write_to(folder: &Path) -> std::io::Result<()> {
    for (name, bytes) in FILES {
        let file = folder.join(name);
        if let Some(parent) = file.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(file, bytes)?;
    }
    Ok(())
}
