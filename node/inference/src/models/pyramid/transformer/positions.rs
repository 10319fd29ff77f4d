//! The SD3 form's video tokens: a convolution of one patch each, and the places in a picture that are added to them, cut
//! from the middle of a stored square table.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::models::pyramid::config::{PATCH, TransformerConfig};
use crate::models::pyramid::rope::spread;
use crate::nn::linear::Linear;

/// A convolution of one patch is a product with a packed token, whose cells lie row by row with their channels together.
pub(super) fn load_patches(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Linear> {
    let shape = (config.inner(), config.latent_channels, PATCH, PATCH);
    let weight = vb.get(shape, "weight")?.permute((0, 2, 3, 1))?.contiguous()?.flatten_from(1)?;
    Linear::new(weight, Some(vb.get(config.inner(), "bias")?))
}

/// The table.
pub(super) struct Positions {
    /// `[side, side, width]`.
    table: Tensor,
    side: usize,
}

impl Positions {
    /// Reads the table of so many rows and columns.
    pub(super) fn load(side: usize, width: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let table = vb.get((1, side * side, width), "pos_embed")?.reshape((side, side, width))?;
        Ok(Self { table, side })
    }

    /// What is added to the tokens of clips, each of so many frames, rows and columns, `[1, tokens, width]`, f32. The last
    /// clip is the largest: smaller ones have the places, between those of its tokens, of what they stand for.
    pub(super) fn of(&self, clips: &[[usize; 3]]) -> Result<Tensor> {
        let [_, rows, columns] = clips.last().copied().unwrap_or_default();
        if rows > self.side || columns > self.side {
            let side = self.side;
            candle_core::bail!(
                "{rows} x {columns} tokens are more than the {side} x {side} that have positions"
            );
        }
        let (top, left) = ((self.side - rows) / 2, (self.side - columns) / 2);
        let whole = self.table.narrow(0, top, rows)?.narrow(1, left, columns)?;
        let whole = whole.contiguous()?.to_dtype(DType::F32)?;
        let parts = clips.iter().map(|&[frames, height, width]| {
            let down = between(&whole, 0, &spread(height, rows))?;
            let places = between(&down, 1, &spread(width, columns))?.flatten(0, 1)?;
            let (tokens, width) = places.dims2()?;
            places.unsqueeze(0)?.broadcast_as((frames, tokens, width))?.reshape((1, frames * tokens, width))
        });
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)
    }
}

/// The entries of a dimension at these places, straight lines between.
fn between(x: &Tensor, dim: usize, places: &[f64]) -> Result<Tensor> {
    let last = x.dim(dim)?.saturating_sub(1);
    if places.iter().enumerate().all(|(index, &place)| place == index as f64) && places.len() == last + 1 {
        return Ok(x.clone());
    }
    let device = x.device();
    let lower: Vec<usize> = places.iter().map(|place| (place.floor() as usize).min(last)).collect();
    let entries = |indices: Vec<u32>, device: &Device| {
        let count = indices.len();
        x.index_select(&Tensor::from_vec(indices, count, device)?, dim)
    };
    let upper = lower.iter().map(|&index| (index + 1).min(last) as u32).collect();
    let shares: Vec<f32> =
        places.iter().zip(&lower).map(|(place, &lower)| (place - lower as f64) as f32).collect();
    let mut shape = vec![1; x.rank()];
    shape[dim] = shares.len();
    let share = Tensor::from_vec(shares, shape, device)?;
    let from = entries(lower.iter().map(|&index| index as u32).collect(), device)?;
    let way = (entries(upper, device)? - &from)?;
    from + way.broadcast_mul(&share)?
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn positions(side: usize) -> Positions {
        let table = Tensor::arange(0f32, (side * side) as f32, &Device::Cpu).unwrap();
        Positions { table: table.reshape((side, side, 1)).unwrap(), side }
    }

    fn flat(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn places_are_cut_from_the_middle_and_smaller_pictures_lie_between_them() {
        let table = positions(6);
        assert_eq!(flat(&table.of(&[[1, 2, 2]]).unwrap()), [14.0, 15.0, 20.0, 21.0]);
        let both = flat(&table.of(&[[2, 1, 1], [1, 2, 2]]).unwrap());
        assert_eq!(both, [17.5, 17.5, 14.0, 15.0, 20.0, 21.0]);
        // A quarter: the middle two of four.
        assert_eq!(flat(&table.of(&[[1, 1, 1], [1, 4, 4]]).unwrap())[0], 17.5);
    }

    #[test]
    fn a_picture_that_is_larger_than_the_table_is_refused() {
        let said = positions(6).of(&[[1, 7, 2]]).unwrap_err().to_string();
        assert!(said.contains("7 x 2") && said.contains("6 x 6"), "{said}");
    }
}
