//! What a request's adapters take that stand beside the model's layers ([`crate::adapter::Places::apply`]).
//!
//! The sizes are those that files from strangers claim; whether they fit a model is not known yet.

use std::collections::BTreeMap;

use candle_core::DType;

use crate::adapter::{Adapter, LayerSize};
use crate::nn::pack::PANEL;

/// Adapters beside layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Beside {
    /// Bytes of their matrices.
    pub(crate) bytes: u64,
    /// Bytes beside them while those of a layer are made.
    pub(crate) loading: u64,
    /// Bytes of their files, which are kept as long as the request.
    pub(crate) files: u64,
    /// By channels in and out of a layer, the rank that its adapters have together.
    pub(crate) ranks: BTreeMap<(usize, usize), usize>,
}

impl Beside {
    pub(crate) fn new(adapters: &[Adapter], dtype: DType, cpu: bool) -> Self {
        let mut this = Self::default();
        let mut layers = BTreeMap::<String, LayerSize>::new();
        for (index, Adapter { lora, .. }) in adapters.iter().enumerate() {
            let known = adapters[..index].iter().any(|before| std::sync::Arc::ptr_eq(&before.lora, lora));
            if !known {
                this.files = this.files.saturating_add(lora.len());
            }
            for (name, size) in lora.sizes() {
                let all = layers.entry(name).or_default();
                // A bias alone comes with matrices of rank 1 that are zero.
                let rank = all.rank.saturating_add(size.rank.max(1));
                *all = LayerSize {
                    input: all.input.max(size.input),
                    output: all.output.max(size.output),
                    rank,
                    bias: all.bias.max(size.bias),
                };
            }
        }
        for LayerSize { input, output, rank, bias } in layers.into_values() {
            let numbers = numbers_in(&[(input, rank), (rank, output), (1, bias)]);
            let wide = numbers.saturating_mul(size_of::<f32>() as u64);
            let own = if cpu {
                let panels = |size: usize| size.checked_next_multiple_of(PANEL).unwrap_or(usize::MAX);
                let packed = numbers_in(&[(input, panels(rank)), (rank, panels(output)), (1, bias)]);
                packed.saturating_mul(size_of::<f32>() as u64)
            } else {
                numbers.saturating_mul(dtype.size_in_bytes() as u64)
            };
            this.bytes = this.bytes.saturating_add(own);
            // In f32, as they come out of their files, scaled, and one behind the other.
            let made = if cpu { wide.saturating_mul(3) } else { 0 };
            this.loading = this.loading.max(made);
            let most = this.ranks.entry((input, output)).or_default();
            *most = rank.max(*most);
        }
        this
    }
}

fn numbers_in(matrices: &[(usize, usize)]) -> u64 {
    matrices
        .iter()
        .fold(0, |all, &(rows, columns)| all.saturating_add((rows as u64).saturating_mul(columns as u64)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::adapter::Lora;

    const LAYER: &str = "transformer.transformer_blocks.0.attn1.to_q";

    fn adapter(tensors: &[(&str, &[usize])]) -> Adapter {
        let data: Vec<Vec<u8>> =
            tensors.iter().map(|(_, shape)| vec![0; 4 * shape.iter().product::<usize>()]).collect();
        let views = tensors.iter().zip(&data).map(|((part, shape), data)| {
            (format!("{LAYER}.{part}"), TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap())
        });
        let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        Adapter { lora: Arc::new(Lora::from_bytes(bytes, "the adapter").unwrap()), scale: 1.0 }
    }

    #[test]
    fn adapters_of_one_layer_add_up_in_any_order_and_a_file_counts_once() {
        let matrices = adapter(&[("lora_A.weight", &[16, 64]), ("lora_B.weight", &[32, 16])]);
        let bias = adapter(&[("diff_b", &[32])]);
        let one = Beside::new(std::slice::from_ref(&matrices), DType::F32, true);
        assert!(one.bytes >= 4 * 16 * (64 + 32), "{one:?}");
        let both = Beside::new(&[matrices.clone(), bias.clone()], DType::F32, true);
        assert_eq!(both, Beside::new(&[bias, matrices.clone()], DType::F32, true));
        assert!(both.bytes > one.bytes && both.loading > one.loading, "{one:?} {both:?}");
        assert_eq!(both.ranks, BTreeMap::from([((64, 32), 17)]));
        let twice = Beside::new(&[matrices.clone(), matrices], DType::F32, true);
        assert_eq!((twice.files, twice.ranks), (one.files, BTreeMap::from([((64, 32), 32)])));
    }
}
