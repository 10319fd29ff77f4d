//! The layers of a loaded model that adapters may change, and what is done to them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::Adapter;
use super::error::{AdapterError, AdapterFault};
use super::lora::{Delta, Lora};
use super::names::TRANSFORMER;
use crate::nn::beside::{Branch, Entered, Named, Place, Register};

/// The layers of one model that adapters may change. Clones mean the same list; it is filled while the model is loaded
/// with it in its [`crate::LoadOptions`].
#[derive(Clone, Default)]
pub struct Places(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    layers: BTreeMap<String, Layer>,
    /// What stands beside layers now: a layer that is loaded again gets it again.
    beside: BTreeMap<String, Arc<Branch>>,
    /// What is added to weights while they are loaded.
    merged: Vec<Adapter>,
    /// Which layers of the merged files were met.
    met: BTreeSet<(usize, String)>,
    /// Why one of them does not fit.
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

    /// The names of all layers, `COMPONENT.LAYER`.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.lock().layers.keys().cloned().collect()
    }

    /// Where the layers of the component in this folder are entered; `None` for one that adapters do not change.
    pub(crate) fn of_component(&self, folder: &Path) -> Option<Arc<dyn Register>> {
        let name = folder.file_name()?.to_str()?;
        let component = if name.starts_with("diffusion_transformer") { TRANSFORMER } else { name };
        let places = self.clone();
        component
            .starts_with(TRANSFORMER)
            .then(|| Arc::new(Component { places, prefix: format!("{component}.") }) as _)
    }

    /// Checks, after the model was loaded or failed to, that the merged adapters fit it with every layer.
    ///
    /// # Errors
    /// The first layer that does not fit, or that the model does not have.
    pub(crate) fn check_merged(&self, loaded: bool) -> Result<(), AdapterError> {
        let mut inner = self.lock();
        if let Some(fault) = inner.fault.take() {
            return Err(fault);
        }
        for (index, adapter) in inner.merged.iter().enumerate().filter(|_| loaded) {
            let lora = &adapter.lora;
            if let Some(own) = lora.layers().find(|own| !inner.met.contains(&(index, (*own).to_owned()))) {
                return Err(AdapterFault::NoLayer { key: lora.key_of(own) }.of(lora.name()));
            }
        }
        Ok(())
    }

    /// Puts adapters beside the layers, until what it gives is dropped. Those that the model was loaded with come first
    /// and are not put there again.
    ///
    /// # Errors
    /// When one of them does not fit this model; nothing is changed then.
    pub fn apply(&self, adapters: &[Adapter]) -> Result<Applied, AdapterError> {
        let branches = self.branches(adapters)?;
        let mut inner = self.lock();
        for (name, branch) in branches {
            if let Some(layer) = inner.layers.get(&name) {
                layer.place.put(Some(Arc::clone(&branch)));
            }
            inner.beside.insert(name, branch);
        }
        Ok(Applied(self.clone()))
    }

    fn branches(&self, adapters: &[Adapter]) -> Result<BTreeMap<String, Arc<Branch>>, AdapterError> {
        let inner = self.lock();
        let first = adapters.iter().zip(&inner.merged).take_while(|(asked, merged)| asked.is(merged)).count();
        if first < inner.merged.len() {
            let name = inner.merged[first].lora.name();
            return Err(AdapterFault::Merged.of(name));
        }
        let mut deltas: BTreeMap<String, Vec<(Delta, f64)>> = BTreeMap::new();
        let mut last = "";
        for Adapter { lora, scale } in &adapters[first..] {
            last = lora.name();
            for (name, delta) in found(lora, *scale, &inner.layers).map_err(|fault| fault.of(last))? {
                deltas.entry(name).or_default().push((delta, *scale));
            }
        }
        let branches = deltas.into_iter().filter_map(|(name, deltas)| {
            let layer = inner.layers.get(&name)?;
            Some(layer.branch(&deltas).map(|branch| (name, Arc::new(branch))))
        });
        branches.collect::<candle_core::Result<_>>().map_err(|error| AdapterFault::from(error).of(last))
    }

    fn clear(&self) {
        let mut inner = self.lock();
        inner.beside.clear();
        inner.layers.values().for_each(|layer| layer.place.put(None));
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
        self.0.clear();
    }
}

/// What a file adds to the model's layers, by their names.
fn found(
    lora: &Lora,
    scale: f64,
    layers: &BTreeMap<String, Layer>,
) -> Result<BTreeMap<String, Delta>, AdapterFault> {
    if !scale.is_finite() {
        return Err(AdapterFault::Scale(scale));
    }
    let mut found = BTreeMap::new();
    for own in lora.layers() {
        let name = Lora::candidates(own).find(|name| layers.contains_key(name));
        let named = name.and_then(|name| layers.get(&name).map(|layer| (name, layer)));
        let Some((name, layer)) = named else { return Err(AdapterFault::NoLayer { key: lora.key_of(own) }) };
        let Some(delta) = lora.delta(own, &name, (layer.input, layer.output))? else { continue };
        if found.insert(name, delta).is_some() {
            return Err(AdapterFault::Twice { key: lora.key_of(own) });
        }
    }
    Ok(found)
}

impl Layer {
    /// All adapters of a layer as one branch: the ranks side by side.
    fn branch(&self, deltas: &[(Delta, f64)]) -> candle_core::Result<Branch> {
        let downs: Vec<_> = deltas.iter().map(|(delta, _)| &delta.down).collect();
        let ups = deltas
            .iter()
            .map(|(delta, scale)| &delta.up * *scale)
            .collect::<candle_core::Result<Vec<_>>>()?;
        let here = |tensor: Tensor| self.in_order(tensor)?.to_dtype(self.dtype)?.to_device(&self.device);
        let bias = summed_bias(deltas)?.map(here).transpose()?;
        let down = Tensor::cat(&downs, 0)?.to_dtype(self.dtype)?.to_device(&self.device)?;
        Branch::new(down, here(Tensor::cat(&ups, 1)?)?, bias)
    }

    fn in_order(&self, tensor: Tensor) -> candle_core::Result<Tensor> {
        in_order(tensor, self.rows.as_deref())
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
    let mut sum: Option<Tensor> = None;
    for (delta, scale) in deltas {
        if let Some(bias) = &delta.bias {
            let scaled = (bias * *scale)?;
            sum = Some(match sum {
                Some(sum) => (sum + scaled)?,
                None => scaled,
            });
        }
    }
    Ok(sum)
}

/// The layers of one component.
struct Component {
    places: Places,
    prefix: String,
}

impl Register for Component {
    fn enter(&self, layer: &Named<'_>) -> candle_core::Result<Entered> {
        let name = format!("{}{}", self.prefix, layer.name);
        let mut inner = self.places.lock();
        let place = Place::default();
        place.put(inner.beside.get(&name).cloned());
        let merged = inner.merge(&name, layer)?;
        let (weight, bias) = merged.map_or((None, None), |(weight, bias)| (Some(weight), bias));
        let known = Layer {
            place: place.clone(),
            input: layer.input,
            output: layer.output,
            rows: layer.rows.map(<[u32]>::to_vec),
            dtype: layer.dtype,
            device: layer.device.clone(),
        };
        inner.layers.insert(name, known);
        Ok(Entered { place, weight, bias })
    }
}

impl Inner {
    /// What the merged adapters add to a layer's weights and bias.
    fn merge(
        &mut self,
        name: &str,
        layer: &Named<'_>,
    ) -> candle_core::Result<Option<(Tensor, Option<Tensor>)>> {
        let deltas = match self.deltas(name, layer) {
            Ok(deltas) => deltas,
            Err(error) => {
                let text = error.to_string();
                self.fault = Some(error);
                candle_core::bail!("{text}")
            }
        };
        let mut sum: Option<Tensor> = None;
        for (delta, scale) in &deltas {
            let product = (delta.up.matmul(&delta.down)? * *scale)?;
            sum = Some(match sum {
                Some(sum) => (sum + product)?,
                None => product,
            });
        }
        let Some(weight) = sum else { return Ok(None) };
        let bias = summed_bias(&deltas)?.map(|bias| in_order(bias, layer.rows)).transpose()?;
        Ok(Some((in_order(weight, layer.rows)?, bias)))
    }

    /// What each of the merged adapters has for a layer.
    fn deltas(&mut self, name: &str, layer: &Named<'_>) -> Result<Vec<(Delta, f64)>, AdapterError> {
        let mut deltas = Vec::new();
        for (index, Adapter { lora, scale }) in self.merged.iter().enumerate() {
            let fault = |fault: AdapterFault| fault.of(lora.name());
            let fits = |own: &&str| Lora::candidates(own).any(|candidate| candidate == name);
            let mut owns = lora.layers().filter(fits);
            let Some(own) = owns.next() else { continue };
            if let Some(second) = owns.next() {
                return Err(fault(AdapterFault::Twice { key: lora.key_of(second) }));
            }
            if !scale.is_finite() {
                return Err(fault(AdapterFault::Scale(*scale)));
            }
            self.met.insert((index, own.to_owned()));
            let delta = lora.delta(own, name, (layer.input, layer.output)).map_err(fault)?;
            deltas.extend(delta.map(|delta| (delta, *scale)));
        }
        Ok(deltas)
    }
}
