//! What can be wrong with an adapter.

/// An adapter that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("adapter {adapter}: {fault}")]
pub struct AdapterError {
    /// Which, as it was named.
    pub adapter: String,
    /// What is wrong with it.
    #[source]
    pub fault: AdapterFault,
}

/// What is wrong with an adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterFault {
    /// A file that the system does not give.
    #[error("its file cannot be read: {0}")]
    Read(std::io::Error),
    /// A file that is no safetensors file.
    #[error("it is no safetensors file: {0}")]
    Corrupt(String),
    /// More than is read.
    #[error("{what}: {given} exceed the limit of {limit}")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much there may be.
        limit: u64,
        /// How much there is.
        given: u64,
    },
    /// A tensor with a name that is no adapter's.
    #[error("tensor {key:?} is no part of a LoRA that is known here")]
    UnknownKey {
        /// Its name.
        key: String,
    },
    /// A tensor for a layer that the model does not have.
    #[error("tensor {key:?} fits no layer of this model: it was trained on another one")]
    NoLayer {
        /// Its name.
        key: String,
    },
    /// A tensor of another shape than the layer needs.
    #[error("tensor {key:?} has shape {found:?}, layer {layer} needs {needed}")]
    Shape {
        /// Its name.
        key: String,
        /// Its shape.
        found: Vec<usize>,
        /// The layer.
        layer: String,
        /// What would fit.
        needed: String,
    },
    /// A tensor without the other one that it is multiplied with.
    #[error("tensor {key:?} stands alone: the {missing} matrix of its layer is missing")]
    Alone {
        /// Its name.
        key: String,
        /// `down` or `up`.
        missing: &'static str,
    },
    /// Two tensors for the same.
    #[error("tensor {key:?} is there twice, under two names")]
    Twice {
        /// The second one's name.
        key: String,
    },
    /// Numbers of a kind that is not read.
    #[error("tensor {key:?} is {dtype}: F32, F16 and BF16 are read")]
    Numbers {
        /// Its name.
        key: String,
        /// What it is.
        dtype: String,
    },
    /// A value that is no number.
    #[error("tensor {key:?} holds values that are not finite")]
    NotFinite {
        /// Its name.
        key: String,
    },
    /// A scale that is no number.
    #[error("its scale is {0}: it must be a finite number")]
    Scale(f64),
    /// A file without anything in it.
    #[error("it holds no matrices")]
    Empty,
    /// Other adapters are in the weights than the run asks for first.
    #[error("the model was loaded with other adapters in its weights")]
    Merged,
    /// The tensor library.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl AdapterFault {
    /// A short stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read(_) => "adapter_read",
            Self::Corrupt(_) => "adapter_corrupt",
            Self::TooLarge { .. } => "adapter_too_large",
            Self::UnknownKey { .. } => "adapter_unknown_key",
            Self::NoLayer { .. } => "adapter_no_layer",
            Self::Shape { .. } => "adapter_shape",
            Self::Alone { .. } => "adapter_alone",
            Self::Twice { .. } => "adapter_twice",
            Self::Numbers { .. } => "adapter_numbers",
            Self::NotFinite { .. } => "adapter_not_finite",
            Self::Scale(_) => "adapter_scale",
            Self::Empty => "adapter_empty",
            Self::Merged => "adapter_merged",
            Self::Tensor(_) => "adapter_tensor",
        }
    }

    /// The error about the adapter of that name.
    pub(super) fn of(self, adapter: &str) -> AdapterError {
        AdapterError { adapter: adapter.to_owned(), fault: self }
    }
}
