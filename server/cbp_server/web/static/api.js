// Asks the HTTP API. Paths are relative to the page, so that it works behind a path prefix, too.

const TIMEOUT_MS = 5000;

export class HttpError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export async function get(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), headers: { Accept: "application/json" } });
  const body = await response.json();
  if (!response.ok) throw new HttpError(response.status, body.detail ?? response.statusText);
  return body;
}
