//! The encoder of Pyramid Flow's VAE: from a video to the distribution of its latents.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::{FrameNorm, Middle, Pass, Resnet, cube, point, resnets};
use super::config::PyramidVaeConfig;
use crate::nn::conv3d::Conv3d;

/// The encoder with the layer behind it.
#[derive(Debug, Clone)]
pub(super) struct Encoder {
    conv_in: Conv3d,
    blocks: Vec<Down>,
    middle: Middle,
    norm_out: FrameNorm,
    conv_out: Conv3d,
    quant: Conv3d,
}

#[derive(Debug, Clone)]
struct Down {
    resnets: Vec<Resnet>,
    spatial: Option<Conv3d>,
    temporal: Option<Conv3d>,
}

impl Encoder {
    pub(super) fn load(config: &PyramidVaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let (channels, groups) = (&config.encoder_block_out_channels, config.encoder_norm_num_groups);
        let moments = 2 * config.encoder_out_channels;
        let quant = Conv3d::load(point(moments, moments), vb.pp("quant_conv").pp("conv"))?;
        let vb = vb.pp("encoder");
        let first = channels.first().copied().unwrap_or_default();
        let last = channels.last().copied().unwrap_or_default();
        let block = |index: usize| {
            let vb = vb.pp("down_blocks").pp(index);
            let (input, output) = (channels[index.saturating_sub(1)], channels[index]);
            let down = |wanted: bool, name: &str, stride| {
                let load = || Conv3d::load(cube(output, output, stride), vb.pp(name).pp("0.conv.conv"));
                wanted.then(load).transpose()
            };
            Ok(Down {
                resnets: resnets(config.encoder_layers_per_block[index], input, output, groups, &vb)?,
                spatial: down(config.encoder_spatial_down_sample[index], "downsamplers", [1, 2, 2])?,
                temporal: down(
                    config.encoder_temporal_down_sample[index],
                    "temporal_downsamplers",
                    [2, 1, 1],
                )?,
            })
        };
        Ok(Self {
            conv_in: Conv3d::load(cube(config.encoder_in_channels, first, [1; 3]), vb.pp("conv_in.conv"))?,
            blocks: (0..channels.len()).map(block).collect::<Result<Vec<_>>>()?,
            middle: Middle::load(last, groups, &vb.pp("mid_block"))?,
            norm_out: FrameNorm::load(groups, last, vb.pp("conv_norm_out"))?,
            conv_out: Conv3d::load(cube(last, moments, [1; 3]), vb.pp("conv_out.conv"))?,
            quant,
        })
    }

    /// `(batch, time, height, width, 3)` to means and logarithms of variances, `(.., 2 * latent channels)`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let pass = &mut Pass::Whole;
        let mut x = pass.conv(&self.conv_in, x)?;
        for block in &self.blocks {
            for resnet in &block.resnets {
                x = resnet.forward(&x, pass)?;
            }
            for conv in [&block.spatial, &block.temporal].into_iter().flatten() {
                x = pass.conv(conv, &x)?;
            }
        }
        let x = self.middle.forward(&x, pass)?;
        let x = pass.conv(&self.conv_out, &self.norm_out.forward_silu(&x)?)?;
        self.quant.forward(&x)
    }
}
