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
                let rank = all.rank.saturating_add(size.rank);
                *all = LayerSize { rank, bias: all.bias.max(size.bias), ..size };
            }
        }
        for LayerSize { input, output, rank, bias } in layers.into_values() {
            let numbers = numbers_in(&[(input, rank), (rank, output), (1, bias)]);
            let wide = numbers.saturating_mul(size_of::<f32>() as u64);
            let own = if cpu {
                let packed = numbers_in(&[
                    (input, rank.next_multiple_of(PANEL)),
                    (rank, output.next_multiple_of(PANEL)),
                    (1, bias),
                ]);
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
