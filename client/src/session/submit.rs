//! From what is asked to a job: find nodes, choose the model, fill what was left open, hand it over.

use kinoflock_protocol::job::Audience;
use kinoflock_protocol::work::work;

use super::find::Found;
use super::place::Placing;
use super::{Client, Events, SessionError, nonce, random};
use crate::ask::Ask;
use crate::store::{Audits, JobRecord};
use crate::ticket::Way;

/// Nodes that watch a job while its client is away, unless the artist says otherwise.
const CUSTODIANS: usize = 2;

impl Client {
    /// Finds nodes, chooses one, and hands the job to it. From the moment it is sent, its record is in the store.
    ///
    /// # Errors
    /// See [`SessionError`]; `NoTaker` tells every node's reason.
    pub async fn submit(&self, ask: &Ask, ways: &[Way], events: &Events) -> Result<JobRecord, SessionError> {
        ask.check()?;
        let found = self.find_for(ask, ways, events).await?;
        let placing = self.prepare(ask, &found).await?;
        self.hand_in(ask, placing, &found, events).await
    }

    /// Hands a prepared job over, its files ready to be fetched from here.
    pub(super) async fn hand_in(
        &self,
        ask: &Ask,
        placing: Placing,
        found: &[Found],
        events: &Events,
    ) -> Result<JobRecord, SessionError> {
        for input in ask.initial_latents.iter().chain(ask.pictures.files()) {
            self.store.insert_blob(input)?;
        }
        self.inputs.serve(placing.spec.inputs().iter().map(|blob| blob.id));
        self.place(placing, found, events).await
    }

    /// Who names a node trusts that one with the prompt, and not whoever else is near.
    pub(super) async fn find_for(
        &self,
        ask: &Ask,
        ways: &[Way],
        events: &Events,
    ) -> Result<Vec<Found>, SessionError> {
        if ask.pinned {
            return self.find_named(ways, events).await;
        }
        let mut found = self.find(ways, events).await?;
        if let Some(model) = &ask.model {
            self.seek(model, &mut found).await;
        }
        Ok(found)
    }

    /// The job as it would be signed.
    pub(super) async fn prepare(&self, ask: &Ask, found: &[Found]) -> Result<Placing, SessionError> {
        let model = self.choose_model(ask.model.as_deref(), found)?;
        let manifest = self.manifest(&model, found).await?;
        let seed = ask.seed.map_or_else(random, Ok)?;
        let mut spec = ask.to_spec(model.id, &manifest, seed, nonce()?)?;
        if let (true, [only]) = (ask.pinned, found) {
            spec.addressed_to = Audience::Node(only.candidate.node);
        }
        // Without a commitment there is nothing that an auditor could look at.
        let share = if ask.pinned || !spec.returns.step_root { 0 } else { ask.audit_share };
        Ok(Placing {
            work: work(&manifest.work, &spec.shape()),
            spec,
            model,
            require_terms: ask.require_terms,
            pinned: ask.pinned,
            deadline: ask.deadline,
            signed: None,
            before: None,
            resume: None,
            former: Vec::new(),
            // Who names a node trusts that one alone with the prompt.
            wanted_custodians: if ask.pinned { 0 } else { ask.custodians.unwrap_or(CUSTODIANS) },
            custodians: Vec::new(),
            batch: None,
            audits: Audits { share, ..Audits::default() },
        })
    }
}
