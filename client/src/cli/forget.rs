//! `forget`: a clip is removed here and at every node that had it, each of which says so.

use kinoflock_protocol::{JobId, NodeId};
use serde::Serialize;

use super::context::Context;
use super::failure::{Exit, Failure};
use crate::store::StoreError;

#[derive(Serialize)]
struct Heard<'a> {
    event: &'static str,
    job: JobId,
    node: NodeId,
    error: Option<&'a str>,
}

pub(super) async fn forget(text: &str, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let record = if text.starts_with(JobId::PREFIX) {
        store.job(&store.find_job(text)?)?
    } else {
        let none = StoreError::NotFound { what: "job of clip", given: text.to_owned(), list: "ls" };
        store.job_of_clip(&store.find_clip(text)?)?.ok_or(none)?
    };
    let job = record.job;
    if !record.state.is_final() {
        let text = format!("job {} is under way; stop it first: kinoflock cancel {0}", job.short());
        return Err(Failure::new(Exit::Usage, "job_under_way", text));
    }
    let client = context.client().await?;
    let heard = client.forget(&job).await?;
    client.stop().await;
    for blob in [record.clip, record.latents].into_iter().flatten() {
        store.remove_blob(&blob.id)?;
    }
    for node in &heard {
        let error = node.error.as_deref();
        context.out.record(&Heard { event: "forgotten", job, node: node.node, error });
        let said = match (error, node.had) {
            (Some(error), _) => format!("did not confirm: {error}"),
            (None, true) => "has forgotten it".to_owned(),
            (None, false) => "holds nothing of it for your key".to_owned(),
        };
        context.out.line(&format!("node ...{} {said}", node.node.short()));
    }
    let silent = heard.iter().filter(|node| node.error.is_some()).count();
    if silent > 0 {
        let text = format!(
            "the clip is removed here; {silent} of {} nodes did not confirm: ask them again with: kinoflock forget {}",
            heard.len(),
            job.short()
        );
        return Err(Failure::new(Exit::NoNode, "not_confirmed", text));
    }
    if let Some(clip) = record.clip {
        store.remove_clip(&clip.id.into())?;
    }
    store.remove_job(&job)?;
    context.out.words(&format!("job {} is forgotten here and by {} nodes", job.short(), heard.len()));
    Ok(())
}
