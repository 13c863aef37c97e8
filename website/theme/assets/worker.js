// Search on pages that are opened as files: a browser starts no Worker from a file, so the worker's script runs in a
// frame of its own instead, with the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.scope = new Promise((resolve) => {
        frame.addEventListener("load", () => {
          const scope = frame.contentWindow
          scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = scope.document.createElement("script")
          script.src = new URL(url, location.href)
          script.addEventListener("load", () => resolve(scope))
          scope.document.body.append(script)
        }, { once: true })
      })
      frame.srcdoc = "<!doctype html><title>search</title>"
      const attach = () => document.body.append(frame)
      document.body ? attach() : addEventListener("DOMContentLoaded", attach)
    }

    postMessage(data) {
      this.scope.then((scope) => scope.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
