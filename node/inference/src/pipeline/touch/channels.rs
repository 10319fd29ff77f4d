//! Permuting, scaling and shifting the channels of latents.

use candle_core::{Result, Tensor};

/// What is done to the channels, in the order of the fields; nothing by default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Channels {
    /// Channel `i` becomes what channel `permute[i]` was; empty for none. One may be named twice and another not at all.
    pub permute: Vec<usize>,
    /// Factors, one for all or one each; empty for none.
    pub scale: Vec<f64>,
    /// What is added, one for all or one each; empty for none.
    pub shift: Vec<f64>,
    /// After how many steps; 0 is before the first, `None` after the last, before the decode.
    pub after: Option<usize>,
}

impl Channels {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.permute.is_empty() && self.scale.is_empty() && self.shift.is_empty()
    }

    /// Whether there is something to do after so many steps, `None` before the decode.
    pub(crate) fn is_due(&self, after: Option<usize>) -> bool {
        !self.is_empty() && self.after == after
    }

    /// Of latents whose dimension `axis` has the channels, each with the same number of cells of a token beside each
    /// other.
    ///
    /// # Errors
    /// When the channels do not divide that dimension.
    pub(crate) fn apply(&self, latents: &Tensor, axis: usize, channels: usize) -> Result<Tensor> {
        let shape = latents.dims().to_vec();
        let inner: usize = shape[axis + 1..].iter().product();
        let outer: usize = shape[..axis].iter().product();
        let mut x = latents.contiguous()?.reshape((outer, channels, shape[axis] / channels * inner))?;
        if !self.permute.is_empty() {
            let order: Vec<u32> = self.permute.iter().map(|&from| from as u32).collect();
            x = x.index_select(&Tensor::new(order, latents.device())?, 1)?;
        }
        let each = |values: &[f64]| -> Result<Tensor> {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            let count = values.len();
            Tensor::from_vec(values, (1, count, 1), latents.device())?.to_dtype(latents.dtype())
        };
        if !self.scale.is_empty() {
            x = x.broadcast_mul(&each(&self.scale)?)?;
        }
        if !self.shift.is_empty() {
            x = x.broadcast_add(&each(&self.shift)?)?;
        }
        x.reshape(shape)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;
    use crate::pipeline::latents::pack;

    #[test]
    fn channels_of_tokens_are_those_of_the_volume() {
        let volume = Tensor::arange(0f32, 3.0 * 2.0 * 4.0 * 4.0, &Device::Cpu).unwrap();
        let volume = volume.reshape((1, 3, 2, 4, 4)).unwrap();
        let channels =
            Channels { permute: vec![2, 0, 0], scale: vec![-1.0], shift: vec![0.5, 0.0, 100.0], after: None };
        let flat = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let whole = channels.apply(&volume, 1, 3).unwrap();
        assert_eq!(flat(whole.clone())[..2], [-63.5, -64.5]);
        for patch in [[1, 1, 1], [1, 2, 2], [2, 2, 1]] {
            let tokens = pack(&volume, patch).unwrap();
            let changed = channels.apply(&tokens, 2, 3).unwrap();
            assert_eq!(flat(changed), flat(pack(&whole, patch).unwrap()), "{patch:?}");
        }
    }
}
