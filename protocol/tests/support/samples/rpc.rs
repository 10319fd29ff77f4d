//! Requests and responses, events, blobs.

use super::*;

pub(super) fn blob_request(d: &mut Draw) -> BlobRequest {
    BlobRequest { id: blob_id(d), outline: d.flag(), first_chunk: d.u64(), chunks: d.u64() }
}

pub(super) fn blob_replies(d: &mut Draw) -> List<BlobReply, 8> {
    List::first_of([
        BlobReply::Found { blob: blob(d), outline: d.some(outline) },
        BlobReply::NotFound,
        BlobReply::Busy { retry_after: d.millis() },
        BlobReply::Refused(refusal(d)),
    ])
}

pub(super) fn events(d: &mut Draw) -> List<Progress, 16> {
    let events = [
        JobEvent::AwaitingInputs { missing: d.list(blob_id) },
        JobEvent::Queued { position: d.u32(), eta: d.millis() },
        JobEvent::Loading,
        JobEvent::Step { done: d.u32(), total: d.u32(), eta: d.millis() },
        JobEvent::Preview { step: d.u32(), png: Bytes::new(d.bytes::<20>().to_vec()).unwrap() },
        JobEvent::Checkpoint { checkpoint: envelope(d) },
        JobEvent::Encoding,
        JobEvent::Done { receipt: envelope(d) },
        JobEvent::Failed { code: d.text(), text: d.text(), retryable: d.flag() },
        JobEvent::Cancelled,
    ];
    List::first_of(events.map(|event| Progress { job: job_id(d), seq: d.u64(), event }))
}

pub(super) fn progress_frames(d: &mut Draw) -> List<ProgressFrame, 8> {
    List::first_of([
        ProgressFrame::Open,
        ProgressFrame::Event(one_of(d, events)),
        ProgressFrame::Refused(refusal(d)),
        ProgressFrame::Busy { retry_after: d.millis() },
    ])
}

pub(crate) fn requests(d: &mut Draw) -> List<Request, 16> {
    List::first_of([
        Request::Capacity,
        Request::FindNodes(FindNodes {
            model: d.some(model_id),
            shape: d.some(shape),
            limit: d.u32(),
            forward: d.u32().is_multiple_of(2),
        }),
        Request::Quote(quote_request(d)),
        Request::Submit { order: envelope(d), job: envelope(d), mirrored: d.some(mirrored).map(Box::new) },
        Request::Status(envelope(d)),
        Request::Cancel(envelope(d)),
        Request::Answer(envelope(d)),
        Request::Release { lease: lease(d), reason: ReleaseReason::ChoseAnother },
        Request::Manifest(model_id(d)),
        Request::Cards(model_id(d)),
    ])
}

pub(crate) fn responses(d: &mut Draw) -> List<Response, 16> {
    use JobState as S;
    let states = [S::AwaitingInputs, S::Queued, S::Running, S::Done, S::Failed, S::Cancelled];
    List::first_of([
        Response::Capacity(envelope(d)),
        Response::Nodes(d.list(envelope)),
        Response::Quote(envelope(d)),
        Response::Accepted { job: job_id(d), position: d.u32(), eta: d.millis() },
        Response::Status(JobStatus {
            job: job_id(d),
            state: states[d.below(6) as usize],
            seq: d.u64(),
            position: d.u32(),
            eta: d.millis(),
            receipt: d.some(envelope),
            replicas: d.list(node),
            error: d.some(|d| JobFailure { code: d.text(), text: d.text(), retryable: d.flag() }),
        }),
        Response::Cancelled { job: job_id(d) },
        Response::Acknowledged,
        Response::Manifest(Bytes::new(kinoflock_protocol::codec::encode(&manifest(d))).unwrap()),
        Response::Cards(d.list(envelope)),
        Response::Refused(refusal(d)),
        Response::Busy { retry_after: d.millis() },
        Response::UnsupportedVersion { speaks: 1, sent: 2 },
        Response::error("internal", "what went wrong"),
    ])
}
