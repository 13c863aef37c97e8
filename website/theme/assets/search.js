// A flag or a message can be pasted into the search. To the theme's search `--beta` is a word to leave out and `32:` the
// name of a field: it called both invalid queries and found nothing. So each of these characters is a space here.
// It also takes every word for the beginning of one. In a sentence `^1` takes it as it is: else `a` and `run` find
// whatever begins like them, before the message.
const QUERY = 2 // The theme's number for the message that brings its worker what was typed.
const LONGEST_OF_WORDS = 4
const plain = (typed) => {
  const words = typed.replace(/[-+:~^*]+/g, " ").trim().split(/\s+/)
  return words.join(words.length > LONGEST_OF_WORDS && !typed.includes('"') ? "^1 " : " ")
}
const post = Worker.prototype.postMessage
Worker.prototype.postMessage = function (message, ...rest) {
  post.call(this, message?.type === QUERY ? { ...message, data: plain(message.data) } : message, ...rest)
}
