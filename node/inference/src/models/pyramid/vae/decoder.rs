//! The decoder of Pyramid Flow's VAE: from latents to a video, at once or run by run of latent frames.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::{FrameNorm, Middle, Pass, Resnet, cube, point, resnets};
use super::config::PyramidVaeConfig;
use crate::nn::conv3d::Conv3d;
use crate::nn::shuffle::{block_first, depth_to_space};

/// The decoder with the layer before it.
#[derive(Debug, Clone)]
pub(super) struct Decoder {
    post_quant: Conv3d,
    conv_in: Conv3d,
    middle: Middle,
    blocks: Vec<Up>,
    norm_out: FrameNorm,
    conv_out: Conv3d,
}

#[derive(Debug, Clone)]
struct Up {
    resnets: Vec<Resnet>,
    spatial: Option<Conv3d>,
    temporal: Option<Conv3d>,
}

const SPATIAL: [usize; 3] = [1, 2, 2];
const TEMPORAL: [usize; 3] = [2, 1, 1];

impl Decoder {
    pub(super) fn load(config: &PyramidVaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let latent = config.decoder_in_channels;
        let post_quant = Conv3d::load(point(latent, latent), vb.pp("post_quant_conv.conv"))?;
        let channels: Vec<usize> = config.decoder_block_out_channels.iter().rev().copied().collect();
        let groups = config.decoder_norm_num_groups;
        let vb = vb.pp("decoder");
        let first = channels.first().copied().unwrap_or_default();
        let last = channels.last().copied().unwrap_or_default();
        let block = |index: usize| {
            let vb = vb.pp("up_blocks").pp(index);
            let (input, output) = (channels[index.saturating_sub(1)], channels[index]);
            let up = |wanted: bool, name: &str, cells: [usize; 3]| {
                let count: usize = cells.iter().product();
                let order = block_first(output * count, count);
                let config = cube(output, output * count, [1; 3]);
                let load = || Conv3d::load_ordered(config, &order, vb.pp(name).pp("0.conv.conv"));
                wanted.then(load).transpose()
            };
            Ok(Up {
                resnets: resnets(config.decoder_layers_per_block[index], input, output, groups, &vb)?,
                spatial: up(config.decoder_spatial_up_sample[index], "upsamplers", SPATIAL)?,
                temporal: up(config.decoder_temporal_up_sample[index], "temporal_upsamplers", TEMPORAL)?,
            })
        };
        Ok(Self {
            post_quant,
            conv_in: Conv3d::load(cube(latent, first, [1; 3]), vb.pp("conv_in.conv"))?,
            middle: Middle::load(first, groups, &vb.pp("mid_block"))?,
            blocks: (0..channels.len()).map(block).collect::<Result<Vec<_>>>()?,
            norm_out: FrameNorm::load(groups, last, vb.pp("conv_norm_out"))?,
            conv_out: Conv3d::load(cube(last, config.decoder_out_channels, [1; 3]), vb.pp("conv_out.conv"))?,
        })
    }

    /// `(batch, time, height, width, latent channels)` to `(batch, frames, height, width, 3)`. Where the clip begins with
    /// `z`, its first latent frame becomes a single frame.
    pub(super) fn forward(&self, z: &Tensor, begins: bool, pass: &mut Pass<'_>) -> Result<Tensor> {
        let mut x = pass.conv(&self.conv_in, &self.post_quant.forward(z)?)?;
        x = self.middle.forward(&x, pass)?;
        for block in &self.blocks {
            for resnet in &block.resnets {
                x = resnet.forward(&x, pass)?;
            }
            if let Some(conv) = &block.spatial {
                x = depth_to_space(&pass.conv(conv, &x)?, SPATIAL, 0)?;
            }
            if let Some(conv) = &block.temporal {
                x = depth_to_space(&pass.conv(conv, &x)?, TEMPORAL, usize::from(begins))?;
            }
        }
        pass.conv(&self.conv_out, &self.norm_out.forward_silu(&x)?)
    }
}
