//! The layers of a loaded model that adapters may change, and what is done to them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::Adapter;
use super::error::{AdapterError, AdapterFault};
use super::lora::{Delta, Lora, candidates};
use super::names::TRANSFORMER;
use crate::error::Error;
use crate::nn::beside::{Branch, Entered, Named, Place, Register};

/// The layers of one model that adapters may change. Clones mean the same list; it is filled while the model is loaded
/// with it in its [`crate::LoadOptions`].
#[derive(Clone, Default)]
pub struct Places(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    /// The model's components that adapters may change; their layers are known once they were loaded.
    components: BTreeSet<String>,
    layers: BTreeMap<String, Layer>,
    /// What stands beside layers now: a layer that is loaded again gets it again.
    beside: BTreeMap<String, Arc<Branch>>,
    /// Adapters of which layers are yet to be loaded.
    waiting: Vec<Adapter>,
    /// What is added to weights while they are loaded.
    merged: Vec<Adapter>,
    /// Why an adapter does not fit what was loaded.
    fault: Option<AdapterError>,
}

struct Layer {
    place: Place,
    input: usize,
    output: usize,
    rows: Option<Vec<u32>>,
    dtype: DType,
    device: Device,
}

impl std::fmt::Debug for Places {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Places({} layers)", self.lock().layers.len())
    }
}

impl Places {
    /// A list for a model that is to be loaded with these adapters in its weights.
    #[must_use]
    pub fn merging(adapters: Vec<Adapter>) -> Self {
        Self(Arc::new(Mutex::new(Inner { merged: adapters, ..Inner::default() })))
    }

    /// An empty list for another model, with the same adapters to merge.
    #[must_use]
    pub(crate) fn fresh(&self) -> Self {
        Self::merging(self.lock().merged.clone())
    }

    /// Whether adapters are merged.
    pub(crate) fn merges(&self) -> bool {
        !self.lock().merged.is_empty()
    }

    /// Those of a request's adapters that [`Places::apply`] puts beside the layers.
    pub(crate) fn beside<'a>(&self, adapters: &'a [Adapter]) -> &'a [Adapter] {
        &adapters[self.lock().already_in(adapters)..]
    }

    /// The names of all layers, `COMPONENT.LAYER`.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.lock().layers.keys().cloned().collect()
    }

    /// Where the layers of the component in this folder are entered; `None` for one that adapters do not change.
    pub(crate) fn of_component(&self, folder: &Path) -> Option<Arc<dyn Register>> {
        let name = folder.file_name()?.to_str()?;
        let name = if name.starts_with("diffusion_transformer") { TRANSFORMER } else { name };
        name.starts_with(TRANSFORMER).then(|| {
            self.lock().components.insert(name.to_owned());
            Arc::new(Component { places: self.clone(), name: name.to_owned() }) as _
        })
    }

    /// Checks, after the model was loaded or failed to, that the merged adapters are for components that it has, and fit.
    ///
    /// # Errors
    /// The first layer that does not.
    pub(crate) fn check(&self, loaded: bool) -> Result<(), AdapterError> {
        let mut inner = self.lock();
        if let Some(fault) = inner.fault.take() {
            return Err(fault);
        }
        let mut merged = inner.merged.iter().filter(|_| loaded);
        merged.try_for_each(|adapter| inner.check_components(&adapter.lora))
    }

    /// Says of a failure while something was loaded that an adapter is at fault, where one is.
    pub(crate) fn explain<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        let fault = self.lock().fault.take();
        result.map_err(|error| fault.map_or(error, Error::from))
    }

    /// Puts adapters beside the layers, until what it gives is dropped; beside layers that are loaded later, when they are.
    /// Those that the model was loaded with come first and are not put there again.
    ///
    /// # Errors
    /// When one of them does not fit this model; nothing is changed then.
    pub fn apply(&self, adapters: &[Adapter]) -> Result<Applied, AdapterError> {
        let mut inner = self.lock();
        let first = inner.already_in(adapters);
        if first < inner.merged.len() {
            return Err(AdapterFault::Merged.of(inner.merged[first].lora.name()));
        }
        let adapters = &adapters[first..];
        let branches = inner.branches(adapters)?;
        inner.clear();
        inner.waiting = adapters.to_vec();
        for (name, branch) in branches {
            if let Some(layer) = inner.layers.get(&name) {
                layer.place.put(Some(Arc::clone(&branch)));
            }
            inner.beside.insert(name, branch);
        }
        drop(inner);
        Ok(Applied(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adapters that stand beside a model's layers; dropping it takes them away.
#[derive(Debug)]
#[must_use = "the adapters are taken away when this is dropped"]
pub struct Applied(Places);

impl Drop for Applied {
    fn drop(&mut self) {
        self.0.lock().clear();
    }
}

impl Layer {
    /// All adapters of a layer as one branch: the ranks side by side.
    fn branch(&self, deltas: &[(Delta, f64)]) -> candle_core::Result<Arc<Branch>> {
        let downs: Vec<_> = deltas.iter().map(|(delta, _)| &delta.down).collect();
        let ups = deltas
            .iter()
            .map(|(delta, scale)| &delta.up * *scale)
            .collect::<candle_core::Result<Vec<_>>>()?;
        let rows = self.rows.as_deref();
        let here = |tensor: Tensor| in_order(tensor, rows)?.to_dtype(self.dtype)?.to_device(&self.device);
        let bias = summed_bias(deltas)?.map(here).transpose()?;
        let down = Tensor::cat(&downs, 0)?.to_dtype(self.dtype)?.to_device(&self.device)?;
        Ok(Arc::new(Branch::new(down, here(Tensor::cat(&ups, 1)?)?, bias)?))
    }
}

/// With the rows in the layer's order.
fn in_order(tensor: Tensor, rows: Option<&[u32]>) -> candle_core::Result<Tensor> {
    match rows {
        Some(rows) => tensor.contiguous()?.index_select(&Tensor::new(rows, &Device::Cpu)?, 0),
        None => Ok(tensor),
    }
}

fn summed_bias(deltas: &[(Delta, f64)]) -> candle_core::Result<Option<Tensor>> {
    let biases = deltas.iter().filter_map(|(delta, scale)| Some(delta.bias.as_ref()? * *scale));
    biases.reduce(|sum, bias| sum? + bias?).transpose()
}

/// The layers of one component.
struct Component {
    places: Places,
    name: String,
}

impl Register for Component {
    fn enter(&self, layer: &Named<'_>) -> candle_core::Result<Entered> {
        let name = format!("{}.{}", self.name, layer.name);
        let mut inner = self.places.lock();
        // The same as before, so that no copy of the layer keeps what is taken away.
        let place = inner.layers.get(&name).map_or_else(Place::default, |layer| layer.place.clone());
        let known = Layer {
            place: place.clone(),
            input: layer.input,
            output: layer.output,
            rows: layer.rows.map(<[u32]>::to_vec),
            dtype: layer.dtype,
            device: layer.device.clone(),
        };
        let (weight, bias) = merged(&inner.deltas(&inner.merged, &name, &known).noted(&mut inner)?, &known)?;
        if !inner.beside.contains_key(&name) {
            let deltas = inner.deltas(&inner.waiting, &name, &known).noted(&mut inner)?;
            if !deltas.is_empty() {
                inner.beside.insert(name.clone(), known.branch(&deltas)?);
            }
        }
        place.put(inner.beside.get(&name).cloned());
        inner.layers.insert(name, known);
        Ok(Entered { place, weight, bias })
    }

    fn complete(&self) -> candle_core::Result<()> {
        let mut inner = self.places.lock();
        let mut all = inner.merged.iter().chain(&inner.waiting);
        let found = all.try_for_each(|adapter| inner.check_layers(&adapter.lora, &self.name));
        found.noted(&mut inner)
    }
}

/// A result about adapters, whose error is kept for whoever asked for the load: the tensor library carries texts only.
trait Noted<T> {
    fn noted(self, inner: &mut Inner) -> candle_core::Result<T>;
}

impl<T> Noted<T> for Result<T, AdapterError> {
    fn noted(self, inner: &mut Inner) -> candle_core::Result<T> {
        self.map_err(|error| {
            let text = error.to_string();
            inner.fault = Some(error);
            candle_core::Error::msg(text)
        })
    }
}

/// The layer's component and its own name.
fn component(name: &str) -> &str {
    name.split_once('.').map_or(name, |(component, _)| component)
}

impl Inner {
    /// How many of these, from the first on, are in the weights.
    fn already_in(&self, adapters: &[Adapter]) -> usize {
        adapters.iter().zip(&self.merged).take_while(|(asked, merged)| asked.is(merged)).count()
    }

    /// Takes everything away that stands beside layers.
    fn clear(&mut self) {
        self.beside.clear();
        self.waiting.clear();
        self.layers.values().for_each(|layer| layer.place.put(None));
    }

    /// The branches of these adapters for all layers that are known.
    fn branches(&self, adapters: &[Adapter]) -> Result<BTreeMap<String, Arc<Branch>>, AdapterError> {
        let known: BTreeSet<&str> = self.layers.keys().map(|name| component(name)).collect();
        let mut named = BTreeSet::new();
        for Adapter { lora, scale } in adapters {
            self.check_components(lora)?;
            if !scale.is_finite() {
                return Err(AdapterFault::Scale(*scale).of(lora.name()));
            }
            for component in &known {
                self.check_layers(lora, component)?;
            }
            named.extend(lora.names().filter(|name| self.layers.contains_key(*name)).cloned());
        }
        let mut branches = BTreeMap::new();
        for name in named {
            let Some(layer) = self.layers.get(&name) else { continue };
            let deltas = self.deltas(adapters, &name, layer)?;
            if let Some(last) = adapters.last().filter(|_| !deltas.is_empty()) {
                let fault = |error| AdapterFault::Tensor(error).of(last.lora.name());
                branches.insert(name, layer.branch(&deltas).map_err(fault)?);
            }
        }
        Ok(branches)
    }

    /// What each of these adapters has for a layer.
    fn deltas(
        &self,
        adapters: &[Adapter],
        name: &str,
        layer: &Layer,
    ) -> Result<Vec<(Delta, f64)>, AdapterError> {
        let mut deltas = Vec::new();
        for Adapter { lora, scale } in adapters {
            let fault = |fault: AdapterFault| fault.of(lora.name());
            let own = match lora.owns(name) {
                [] => continue,
                [own] => own,
                [_, second, ..] => return Err(fault(AdapterFault::Twice { key: lora.key_of(second) })),
            };
            if !scale.is_finite() {
                return Err(fault(AdapterFault::Scale(*scale)));
            }
            let delta = lora.delta(own, name, (layer.input, layer.output)).map_err(fault)?;
            deltas.extend(delta.map(|delta| (delta, *scale)));
        }
        Ok(deltas)
    }

    /// Whether the model has all components that a file is for.
    fn check_components(&self, lora: &Lora) -> Result<(), AdapterError> {
        match lora.layers().find(|own| !self.components.contains(component(own))) {
            Some(own) => Err(AdapterFault::NoLayer { key: lora.key_of(own) }.of(lora.name())),
            None => Ok(()),
        }
    }

    /// Whether a component has all layers of it that a file is for.
    fn check_layers(&self, lora: &Lora, of: &str) -> Result<(), AdapterError> {
        let fits = |own: &str| candidates(own).any(|name| self.layers.contains_key(&name));
        match lora.layers().find(|own| component(own) == of && !fits(own)) {
            Some(own) => Err(AdapterFault::NoLayer { key: lora.key_of(own) }.of(lora.name())),
            None => Ok(()),
        }
    }
}

/// What is added to a layer's weights and to its bias.
fn merged(deltas: &[(Delta, f64)], layer: &Layer) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
    let rows = layer.rows.as_deref();
    let products = deltas.iter().map(|(delta, scale)| delta.up.matmul(&delta.down)? * *scale);
    let weight = products.reduce(|sum, product| sum? + product?).transpose()?;
    let weight = weight.map(|weight| in_order(weight, rows)).transpose()?;
    let bias = summed_bias(deltas)?.map(|bias| in_order(bias, rows)).transpose()?;
    Ok((weight, bias))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_nn::VarBuilder;
    use safetensors::tensor::{Dtype, TensorView, serialize};

    use super::*;
    use crate::nn::beside::entering;
    use crate::nn::linear::Linear;

    const INPUT: usize = 4;
    const OUTPUT: usize = 3;

    fn layer(places: &Places) -> candle_core::Result<Linear> {
        let register = places.of_component(Path::new("model/transformer")).unwrap();
        let weight = Tensor::arange(0f32, (INPUT * OUTPUT) as f32, &Device::Cpu)?.reshape((OUTPUT, INPUT))?;
        let tensors = std::collections::HashMap::from([("q.weight".to_owned(), weight)]);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        entering(register, || Linear::load(INPUT, OUTPUT, false, vb.pp("q")))
    }

    fn adapter(layer: &str) -> Adapter {
        let ones: Vec<u8> = std::iter::repeat_n(1f32.to_le_bytes(), INPUT).flatten().collect();
        let parts = [("lora_A", vec![1, INPUT], INPUT), ("lora_B", vec![OUTPUT, 1], OUTPUT)];
        let views = parts.iter().map(|(part, shape, count)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), &ones[..count * 4]).unwrap();
            (format!("transformer.{layer}.{part}.weight"), view)
        });
        let lora = Lora::from_bytes(serialize(views, None).unwrap(), "it").unwrap();
        Adapter { lora: Arc::new(lora), scale: -2.0 }
    }

    fn result(layer: &Linear) -> Vec<f32> {
        let x = Tensor::ones((1, INPUT), DType::F32, &Device::Cpu).unwrap();
        layer.forward(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_layer_that_is_loaded_late_or_again_has_the_adapters_of_the_run() {
        let (plain, changed) = ([6.0, 22.0, 38.0], [-2.0, 14.0, 30.0]);
        let places = Places::default();
        let early = layer(&places).unwrap();
        let applied = places.apply(&[adapter("q")]).unwrap();
        let again = layer(&places).unwrap();
        assert_eq!((result(&early), result(&again)), (changed.to_vec(), changed.to_vec()));
        drop(applied);
        assert_eq!((result(&early), result(&again)), (plain.to_vec(), plain.to_vec()));
        let places = Places::default();
        assert!(places.of_component(Path::new("model/transformer")).is_some());
        let applied = places.apply(&[adapter("q")]).unwrap();
        let late = layer(&places).unwrap();
        assert_eq!(result(&late), changed);
        drop(applied);
        assert_eq!((result(&late), result(&layer(&places).unwrap())), (plain.to_vec(), plain.to_vec()));
    }

    #[test]
    fn a_layer_that_a_component_turns_out_not_to_have_is_told_when_it_is_loaded() {
        let places = Places::default();
        assert!(places.of_component(Path::new("model/vae")).is_none());
        let early = places.apply(&[adapter("q")]).unwrap_err();
        assert_eq!(early.fault.code(), "adapter_no_layer", "no component is known that could have it");
        assert!(places.of_component(Path::new("model/transformer")).is_some());
        let _applied = places.apply(&[adapter("k")]).unwrap();
        let error = places.explain(layer(&places).map_err(Error::from)).unwrap_err();
        assert_eq!(error.code(), "adapter_no_layer", "{error}");
    }
}
