//! Shrinking and growing: the encoder's downward blocks and the decoder's upward ones.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::Draws;
use super::config::{DownBlock, Downsample, UpBlockConfig};
use super::resnet::{Form, ResnetBlock, Resnets};
use crate::nn::conv3d::{Conv3d, Conv3dConfig};
use crate::nn::shuffle::{block_first, depth_to_space, grow_channels, space_to_depth};
use crate::tiling::Margin;

/// Time, height and width double.
const UP: [usize; 3] = [2, 2, 2];

/// A downward block.
#[derive(Debug, Clone)]
pub(super) struct Down {
    resnets: Resnets,
    shrink: Option<Shrink>,
    widen: Option<ResnetBlock>,
}

#[derive(Debug, Clone)]
enum Shrink {
    Strided(Conv3d),
    Folded { conv: Conv3d, block: [usize; 3], group: usize },
}

impl Down {
    pub(super) fn load(
        kind: DownBlock,
        (input, output): (usize, usize),
        layers: usize,
        scale: bool,
        form: Form,
        vb: VarBuilder,
    ) -> Result<Self> {
        let shrink = match kind {
            _ if !scale => None,
            DownBlock::Strided | DownBlock::Folded(Downsample::Conv) => {
                let config = Conv3dConfig::cube(input, input, 3, form.causal).stride([2, 2, 2]);
                Some(Shrink::Strided(Conv3d::load(config, vb.pp("downsamplers.0.conv"))?))
            }
            DownBlock::Folded(Downsample::Fold(block)) => {
                let cells: usize = block.iter().product();
                if !output.is_multiple_of(cells) || !(input * cells).is_multiple_of(output) {
                    candle_core::bail!("{input} channels cannot be folded by {block:?} into {output}");
                }
                let config = Conv3dConfig::cube(input, output / cells, 3, form.causal);
                let conv = Conv3d::load(config, vb.pp("downsamplers.0.conv.conv"))?;
                Some(Shrink::Folded { conv, block, group: input * cells / output })
            }
        };
        let widen = if kind == DownBlock::Strided && input != output {
            Some(ResnetBlock::load(input, output, form, vb.pp("conv_out"))?)
        } else {
            None
        };
        Ok(Self { resnets: Resnets::load(input, layers, form, vb)?, shrink, widen })
    }

    pub(super) fn forward(&self, x: &Tensor, draws: &mut Draws) -> Result<Tensor> {
        let mut x = self.resnets.forward(x, None, draws)?;
        x = match &self.shrink {
            None => x,
            Some(Shrink::Strided(conv)) => conv.forward(&x)?,
            Some(Shrink::Folded { conv, block, group }) => fold(conv, *block, *group, &x)?,
        };
        match &self.widen {
            Some(widen) => widen.forward(&x, None, draws),
            None => Ok(x),
        }
    }
}

/// The convolution's result folded into channels, plus the input folded and averaged over groups of channels.
fn fold(conv: &Conv3d, block: [usize; 3], group: usize, x: &Tensor) -> Result<Tensor> {
    let x = if block[0] > 1 { Tensor::cat(&[&x.narrow(1, 0, block[0] - 1)?, x], 1)? } else { x.clone() };
    let residual = space_to_depth(&x, block)?;
    let (b, t, h, w, channels) = residual.dims5()?;
    let residual = residual.reshape(vec![b, t, h, w, channels / group, group])?.mean(5)?;
    space_to_depth(&conv.forward(&x)?, block)? + residual
}

/// An upward block.
#[derive(Debug, Clone)]
pub(super) struct Up {
    narrow: Option<ResnetBlock>,
    grow: Option<Grow>,
    resnets: Resnets,
}

/// A convolution, then channels into time, height and width.
#[derive(Debug, Clone)]
struct Grow {
    conv: Conv3d,
    /// Copies of the input's channels in the residual.
    repeats: Option<usize>,
}

impl Up {
    pub(super) fn load(config: &UpBlockConfig, form: Form, vb: VarBuilder) -> Result<Self> {
        let cells: usize = UP.iter().product();
        let grow = if config.scale {
            let input = config.output * config.factor;
            let output = input * cells / config.factor;
            let conv = Conv3dConfig::cube(input, output, 3, form.causal);
            let conv =
                Conv3d::load_ordered(conv, &block_first(output, cells), vb.pp("upsamplers.0.conv.conv"))?;
            Some(Grow { conv, repeats: config.residual.then_some(cells / config.factor) })
        } else {
            None
        };
        let narrow = if config.input == config.output {
            None
        } else {
            Some(ResnetBlock::load(config.input, config.output, form, vb.pp("conv_in"))?)
        };
        Ok(Self { narrow, grow, resnets: Resnets::load(config.output, config.layers, form, vb)? })
    }

    /// What a position becomes along each axis.
    pub(super) fn scale(&self) -> usize {
        if self.grow.is_some() { UP[0] } else { 1 }
    }

    /// Positions before the block that its result depends on, given those after it. Convolutions of three taps see
    /// one position on each side, two before in time where they are causal.
    pub(super) fn margin(&self, after: Margin, causal: bool) -> Margin {
        let seen = if causal { 2 } else { 1 };
        let convolutions = 2 * self.resnets.count();
        let mut margin = Margin { time: after.time + convolutions * seen, space: after.space + convolutions };
        if self.grow.is_some() {
            margin =
                Margin { time: margin.time.div_ceil(UP[0]) + seen, space: margin.space.div_ceil(UP[1]) + 1 };
        }
        if self.narrow.is_some() {
            margin = Margin { time: margin.time + 2 * seen, space: margin.space + 2 };
        }
        margin
    }

    pub(super) fn forward(&self, x: &Tensor, timestep: Option<&Tensor>, draws: &mut Draws) -> Result<Tensor> {
        let mut x = match &self.narrow {
            Some(narrow) => narrow.forward(x, None, draws)?,
            None => x.clone(),
        };
        if let Some(grow) = &self.grow {
            x = grow.forward(&x)?;
        }
        self.resnets.forward(&x, timestep, draws)
    }
}

impl Grow {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let grown = self.conv.forward(x)?;
        match self.repeats {
            None => depth_to_space(&grown, UP, UP[0] - 1),
            Some(repeats) => grow_channels(&grown, x, UP, repeats),
        }
    }
}
